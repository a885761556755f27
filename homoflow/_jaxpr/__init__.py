"""Reading a traced function: what it is made of, before any number is computed."""

from ._nonsmooth import nonsmooth_primitives as nonsmooth_primitives
