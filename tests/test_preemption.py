"""SIGTERM, as a scheduler sends it: a checkpoint after the step under way, then exit code 143."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from faults.child import build_trainer
from transformers import TrainerCallback

from dp_trainer import checkpoints, workers
from dp_trainer.preemption import EXIT_CODE


class Send(TrainerCallback):
    """Sends the signal at an event of a step."""

    def __init__(self, event: str, step: int = 3) -> None:
        self.event, self.step = event, step
        self.handlers: list[object] = []
        for name in (
            "on_train_begin",
            "on_step_begin",
            "on_pre_optimizer_step",
            "on_step_end",
            "on_train_end",
        ):
            setattr(self, name, lambda args, state, control, name=name, **_: self.at(name, state))

    def at(self, name: str, state: object) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        if name == self.event and state.global_step >= self.step:
            self.event = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handler_is_restored():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


STRATEGIES = {
    "no saves of its own": {"save_strategy": "no"},
    "steps": {"save_steps": 2},
    "epochs": {"save_strategy": "epoch"},
    "best, last deleted at the end": {
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
}


@pytest.mark.parametrize(
    ("event", "strategy"),
    [
        *[("on_pre_optimizer_step", strategy) for strategy in STRATEGIES],
        ("on_step_begin", "no saves of its own"),
        ("on_step_end", "steps"),
    ],
)
def test_it_saves_after_the_step_and_exits(tmp_path, event, strategy):
    settings = {"max_steps": 5, **STRATEGIES[strategy]}
    run = build_trainer(tmp_path, callback=Send(event), **settings)
    with pytest.raises(SystemExit) as ended:
        run.train()
    assert ended.value.code == EXIT_CODE == 143
    # A signal at the end of the third step is heeded there, one within the fourth at its end.
    last = run.state.global_step
    assert last == (3 if event == "on_step_end" else 4)
    assert run.accountant.steps_spent == last
    folder = checkpoints.newest_complete(tmp_path)
    assert folder.name == f"checkpoint-{last}"
    assert run.args.load_best_model_at_end == ("best" in strategy)
    assert run.args.save_total_limit == STRATEGIES[strategy].get("save_total_limit", 2)
    resumed = build_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.accountant.steps_spent == resumed.state.global_step == 5


def test_the_handler_is_there_only_during_training(tmp_path):
    watch = Send("")
    run = build_trainer(tmp_path, callback=watch, max_steps=2)
    callbacks = list(run.callback_handler.callbacks)
    run.train()
    assert all(handler is not signal.SIG_DFL for handler in watch.handlers)
    assert len(watch.handlers) > 3
    assert run.callback_handler.callbacks == callbacks


def test_it_is_removed_when_training_fails(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise LookupError

    run = build_trainer(tmp_path, callback=Fail())
    with pytest.raises(LookupError):
        run.train()


def test_somebody_elses_handler_stays_in_charge(tmp_path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        run = build_trainer(tmp_path, callback=Send("on_step_end", 1), max_steps=2)
        run.train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [1]
    assert run.state.global_step == 2


def test_training_in_another_thread_is_left_alone(tmp_path):
    run = build_trainer(tmp_path, max_steps=2)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.state.global_step == 2


def test_the_trainers_own_way_is_switched_off(tmp_path):
    """It would also save between a release and the optimizer's step, with a count the weights do not show."""
    run = build_trainer(tmp_path, enable_jit_checkpoint=True, max_steps=2)
    assert not run.args.enable_jit_checkpoint
    run.train()


def _run_that_signals_its_group(folder) -> None:
    os.setpgid(0, 0)

    class ToAll(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                os.killpg(0, signal.SIGTERM)

    build_trainer(folder, callback=ToAll(), max_steps=5, dataloader_num_workers=1).train()


def test_data_workers_outlive_the_schedulers_signal_to_all(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            _run_that_signals_its_group(tmp_path)
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-4"


def test_a_worker_obeys_the_second_signal():
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, workers._outlive_the_first)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
