"""Training runs on Ray Train: the worker group around `training.run.run_training`.

Checkpoints go through our own store, not through Ray's, so that a run resumes under any launcher. Ray restarts a lost worker
group; the loop then finds the newest checkpoint by itself.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from heliostat.data.loading import BatchLoader, Loading
from heliostat.errors import HeliostatError, NonFiniteLossError, PreemptedError, TrainingError, UsageError
from heliostat.runtime.cluster_room import check_room
from heliostat.runtime.elastic import collective_timeout, usable_world
from heliostat.runtime.interrupt import StopFlag, run_interruptible
from heliostat.runtime.online import LocalEvaluator, open_evaluation
from heliostat.runtime.online_actor import RayEvaluator
from heliostat.runtime.online_images import OnlineDraw
from heliostat.runtime.panel import TrainingPanel
from heliostat.runtime.progress import Progress
from heliostat.runtime.relay import Relay, Watcher
from heliostat.runtime.spot_notice import SpotNotice
from heliostat.runtime.training_record import noted, recording
from heliostat.runtime.worker_watch import WorkerWatch
from heliostat.storage import Store
from heliostat.tracking import Run, Tracker
from heliostat.training.run import LoaderFactory, TrainingJob, Watch, in_threads, run_training
from heliostat.training.trainer import Ask
from heliostat.training.world import World


@dataclass(frozen=True)
class TrainingRequest:
    """One run, as the driver describes it to the workers: the artifacts and tracker's runs of the networks that it trains."""

    artifacts: Mapping[str, str]
    job: TrainingJob
    tracker: Tracker
    run_ids: Mapping[str, str]
    online: OnlineDraw | None = None
    """The images of evaluations while training; None evaluates nothing."""

    def outputs(self) -> Mapping[str, Store]:
        """Where each network's files go, by name."""
        return self.job.outputs or dict.fromkeys(self.artifacts, self.job.files)

    def label(self) -> str:
        """The artifacts in one word."""
        return ", ".join(self.artifacts.values())


def train(request: TrainingRequest, runs: Mapping[str, Run], progress: Progress) -> dict[str, Any]:
    """Run a training job to its end, in this process (`num_workers=0`) or on Ray Train. Returns the main rank's summary.

    A first SIGINT or SIGTERM makes it write a checkpoint and raise PreemptedError, a second one interrupts at once.
    """
    panel = TrainingPanel(progress, request.job.config.train.steps, request.artifacts)
    if request.job.config.scaling.num_workers == 0:
        with panel:
            return _train_here(request, runs, progress, panel)
    names = {artifact: name for name, artifact in request.artifacts.items()}

    def show(source: str, metrics: dict[str, float], step: int) -> None:
        if step < 0:
            progress.say(f"  {source}")
        else:
            panel.update(names[source], metrics, step)

    with panel, Watcher(Relay(), show) as relay:
        while True:
            summary = _fit(request, relay, progress)
            if "stopped" not in summary:
                return summary
            wait_seconds = relay.take_leaving()
            if wait_seconds is None:
                raise PreemptedError(summary["stopped"])
            progress.say(f"  {summary['stopped']}; the workers start again in {wait_seconds:.0f} s, when the machine is gone")
            time.sleep(wait_seconds)


def _train_here(request: TrainingRequest, runs: Mapping[str, Run], progress: Progress, panel: TrainingPanel) -> dict[str, Any]:
    with (
        StopFlag(lambda: progress.say(f"  {_STOPPING}")) as flag,
        recording(request.job, World(), runs, progress.say) as record,
    ):

        def report(metrics: Mapping[str, float], step: int, model: str = "") -> None:
            record(metrics, step, model)
            panel.update(model, metrics, step)

        with open_evaluation(
            LocalEvaluator, request.online, request.outputs(), runs=runs, report=report, notify=progress.say
        ) as evaluate:
            watch = Watch(noted(evaluate, runs), asked=lambda: Ask.STOP if flag.is_set() else Ask.GO_ON)
            return run_training(request.job, World(), report, progress.say, watch=watch)


_STOPPING = "stopping after this step with a checkpoint; once more to stop at once"


def _fit(request: TrainingRequest, relay: Relay, progress: Progress) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = request.job.config.scaling
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scaling.start_timeout_seconds)
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    check_room(resources, request.job)
    # Until Ray has noticed that a node is gone it places workers there, and every such start ends at the timeout.
    starts = scaling.max_failures if scaling.max_failures < 0 else max(2, scaling.max_failures)
    low, high = scaling.worker_range
    slim = replace(request, job=replace(request.job, sources=()))  # the tables of images are put once, for data workers as well
    with tempfile.TemporaryDirectory(prefix="heliostat-train-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"request": ray.put(slim), "sources": ray.put(request.job.sources), "relay": relay},
            torch_config=TorchConfig(
                backend="nccl" if scaling.use_gpu else "gloo",
                timeout_s=collective_timeout(request.job.config),
            ),
            scaling_config=ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=scaling.use_gpu,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=scaling.resize_every_seconds,
            ),
            run_config=RunConfig(
                name="run",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=scaling.max_failures, controller_failure_limit=starts),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )

        def ask_to_stop() -> None:
            progress.say(f"  {_STOPPING}")
            relay.ask_to_stop()

        try:
            result = run_interruptible(trainer.fit, ask_to_stop, scaling.stop_grace_seconds)
        except ray.train.TrainingFailedError as error:
            raise _readable(error) from error
    summary: dict[str, Any] = result.return_value or {}
    if "error" in summary:
        raise summary["error"]
    return summary


def _readable(error: BaseException) -> HeliostatError:
    """One line from what Ray wrapped around a worker's own error."""
    failures = getattr(error, "worker_failures", {})
    for rank, cause in failures.items():
        return TrainingError(f"worker {rank} failed: {_cause_line(getattr(cause, 'cause', cause))}; see --debug")
    return TrainingError(f"the worker group failed: {_cause_line(error)}; see --debug")


def _cause_line(error: object) -> str:
    """The last line of an error's text that says something: no colours, no markers below source lines."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    telling = [line.strip() for line in lines if re.search(r"[A-Za-z]{3}", line)]
    return telling[-1][:300] if telling else type(error).__name__


def _worker(parameters: dict[str, Any]) -> dict[str, Any]:
    """Runs in every training process.

    An error that all ranks meet alike is returned, since restarting would not mend it. Any other one is raised: the ranks that
    did not meet it wait in a collective, and only the end of the whole group frees them.
    """
    context = ray.train.get_context()
    request: TrainingRequest = ray.get(parameters["request"])
    relay: Relay = parameters["relay"]
    scaling, rank = request.job.config.scaling, context.get_world_rank()
    device = torch.device("cpu")
    if scaling.use_gpu:
        from ray.train.torch import get_device

        device = get_device()
    world = usable_world(World(rank, context.get_world_size(), device), request.job.config)
    if world is None:
        relay.note(request.label(), f"worker {rank} is left over: the batch cannot be divided by {context.get_world_size()}")
        return {}

    def notify(text: str) -> None:
        relay.note(request.label(), text)

    runs = {name: request.tracker.attach(one, notify) for name, one in request.run_ids.items() if world.is_main}
    job = replace(request.job, sources=ray.get(parameters["sources"]))
    open_loader: LoaderFactory = partial(_from_data_workers, job=job, sources=parameters["sources"])
    if job.config.loader.via == "threads":
        open_loader = in_threads
    spot = SpotNotice(scaling.spot_notice_url) if scaling.spot_notice_url and context.get_local_rank() == 0 else None
    watching = WorkerWatch(
        relay, request.label(), world.rank, stall_seconds=scaling.collective_timeout_seconds, spot=spot
    ).start()
    make_evaluator = partial(
        RayEvaluator, config=job.config.online, start_timeout_seconds=job.config.scaling.start_timeout_seconds
    )
    online = request.online if world.is_main else None
    try:
        with recording(job, world, runs, notify) as record:

            def report(metrics: Mapping[str, float], step: int, model: str = "") -> None:
                record(metrics, step, model)
                relay.push(request.artifacts[model], metrics, step)

            with open_evaluation(
                make_evaluator, online, request.outputs(), runs=runs, report=report, notify=notify
            ) as evaluate:
                watch = Watch(noted(evaluate, runs), asked=watching.asked, mark=watching.mark)
                return run_training(job, world, report, notify, open_loader=open_loader, watch=watch)
    except PreemptedError as stop:
        return {"stopped": str(stop)}
    except HeliostatError as error:
        if world.size > 1 and not isinstance(error, UsageError | NonFiniteLossError):
            raise
        return {"error": error}
    finally:
        watching.stop()


def _from_data_workers(
    loading: Loading, world: World, notify: Callable[[str], None], *, job: TrainingJob, sources: "ray.ObjectRef"
) -> BatchLoader:
    """The loader whose work is done by Ray Data."""
    from heliostat.runtime.ray_loader import RayLoader  # costs a second, which runs without it need not pay

    timeout = job.config.scaling.start_timeout_seconds
    return RayLoader(loading, sources, rank=world.rank, world_size=world.size, notify=notify, start_timeout_seconds=timeout)
