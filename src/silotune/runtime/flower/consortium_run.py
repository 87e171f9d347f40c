"""Submits a run to a consortium's SuperLink, which `silotune server up` keeps, and follows it.

The server app is a separate process. It outlives the process that follows it: if a run is resumed
while its server app is still working, it just follows that server app again.
"""

import shutil

from silotune.core.atomic_files import write_json
from silotune.core.errors import ConfigError
from silotune.core.reading_back import read_object
from silotune.federation.progress import Progress
from silotune.federation.roster import MEMBERS
from silotune.runtime.flower import engine as flower_engine
from silotune.runtime.flower.engine import LOG, measured_from
from silotune.runtime.flower.engine_command import CONNECTION, engine_environment
from silotune.runtime.flower.server_reports import OUTCOME, PROGRESS, Follower
from silotune.runtime.flower.submit import Link
from silotune.runtime.job import Job, Measured

SUBMITTED = "submitted.json"
"""File with Flower's number of the run that was submitted last."""


def drive(job: Job) -> Measured:
    """Run a job's rounds with Flower's deployment engine: a consortium's, or one on this machine.

    Raises:
        ConfigError: The consortium's server is not up.
        SilotuneError: The rounds ended with it, as in any runtime.
    """
    if job.consortium is None:
        return flower_engine.drive(job)
    if job.state.round == 0:
        job.folder.save(job.state, last=False)  # where the server app finds the first adapter
    link = _Hosted(job)
    link.check_up()
    try:
        job.progress.doing("handing the run to the server")
        if not link.is_under_way():
            link.submit()
        outcome = link.follow()
    except BaseException:  # signals too: unless told to stop, the server app would continue
        link.stop()
        raise
    link.forget()
    return measured_from(outcome)


class _Hosted(Link):
    """The consortium's SuperLink, whose processes are not ours."""

    def __init__(self, job: Job) -> None:
        assert job.consortium is not None
        self.engine = (job.consortium / MEMBERS).parent.absolute()
        work = self.engine / "runs" / job.folder.run_id()
        super().__init__(job, work=work, log=job.folder.path / LOG)

    def _environment(self) -> dict[str, str]:
        return engine_environment(
            self.engine / "flwr",
            private=self.engine / "flwr",
            runs=self.work.parent,
            threads=self.job.run.runtime.threads,
        )

    def check_up(self) -> None:
        """Raise if the consortium's server is not up."""
        if not (self.engine / "flwr" / "config.toml").is_file():
            raise ConfigError(
                f"the server of {self.job.consortium} is not up.\n"
                f"  Start it: silotune server up --folder {self.job.consortium}"
            )

    def is_under_way(self) -> bool:
        """Whether this run's server app is already working; if not, stop what is left of it."""
        kept = self.work / SUBMITTED
        if kept.is_file():
            follower = Follower(self.work, Progress())
            follower.follow()
            if (self.work / OUTCOME).exists() or (follower.process and not follower.has_ended()):
                self.run_id = read_object(kept, fix=f"Remove {self.work} and resume.")["run-id"]
                return True
            self.stop()
        return False

    def submit(self) -> None:
        """Hand the app over, and record Flower's number of the run."""
        for name in (PROGRESS, OUTCOME):
            (self.work / name).unlink(missing_ok=True)
        super().submit()
        write_json(self.work / SUBMITTED, {"run-id": self.run_id})

    def stop(self) -> None:
        """Tell Flower that this run is over; it ends the server app."""
        kept = self.work / SUBMITTED
        if self.run_id is None and kept.is_file():
            self.run_id = read_object(kept, fix=f"Remove {self.work} and resume.")["run-id"]
        if self.run_id is not None:
            self._flwr("stop", str(self.run_id), CONNECTION, "--format", "json")
        kept.unlink(missing_ok=True)
        self.run_id = None

    def forget(self) -> None:
        """Remove the engine's files of a run that is over: its outcome is in the run folder now."""
        shutil.rmtree(self.work, ignore_errors=True)
