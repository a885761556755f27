"""Tasks for methods, from a problem and what differs from the defaults."""

import dataclasses

import homoflow as hf
from homoflow._laws._as_laws import laws_to_record
from homoflow._methods._task import Task
from homoflow._observe._recorder import Recorder
from homoflow._observe._time_grid import make_time_grid


def task_of(problem, *, dynamics=None, laws=None, t1=1.0, **options) -> Task:
    dynamics = hf.GradientFlow() if dynamics is None else dynamics
    recorded = laws_to_record(problem, laws)
    recorder = Recorder.create(recorded, dynamics.observables(recorded), {})
    grid = make_time_grid(0, t1, None, problem.dtype)
    task = Task(problem, problem, dynamics, recorder, grid)
    return dataclasses.replace(task, has_user_laws=laws is not None, **options)
