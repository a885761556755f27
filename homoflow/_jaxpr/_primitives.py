"""Classes of primitives that several interpreters use."""

#: Calls that are no more than their body.
TRANSPARENT_CALLS = frozenset(
    {"checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"}
)
#: Calls with a derivative rule of their own.
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
#: Move entries about and keep every one of them.
MOVES_ENTRIES = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "expand_dims",
        "reshape",
        "rev",
        "squeeze",
        "transpose",
    }
)
#: Those that also keep the entries in order.
KEEPS_ORDER = MOVES_ENTRIES - {"rev", "transpose"}
#: Their results jump.
JUMPS = frozenset({"argmax", "argmin", "ceil", "floor", "rem", "round", "sign"})
#: The largest or the smallest of many entries.
MAX_REDUCTIONS = frozenset(
    {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
)
