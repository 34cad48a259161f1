"""Commands that run side by side, each a process with a log, on the GPUs in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from ..prepare import write_text

RECORD, LOG = "job.json", "job.log"
SHOWN = 1500  # characters of a log


@dataclass(frozen=True)
class Job:
    """A command whose results go to a folder.

    Attributes:
        name: as shown.
        folder: its log and, once it has ended, its record go there.
        arguments: of the Python interpreter.
        expected_failure: text in the log of a failure that is a result, and is not run again.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    expected_failure: str | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """`status` (done or failed) and `seconds` of a job that has ended, or None."""
        path = self.folder / RECORD
        return json.loads(path.read_text()) if path.is_file() else None


def run_jobs(jobs: list[Job], parallel: int, gpus: int) -> dict[str, float]:
    """Run the jobs that have no record yet.

    Args:
        parallel: processes at once.
        gpus: of this machine; each process sees one, in turns.

    Returns:
        Seconds of each job that ran, by name.

    Raises:
        RuntimeError: jobs failed; those that could run have. Its message ends with the log of the first.
    """
    waiting = [job for job in jobs if job.record is None]
    slots: Queue[int] = Queue()
    for slot in range(parallel):
        slots.put(slot)

    def run(job: Job) -> float | None:
        slot = slots.get()
        try:
            return _run(job, slot % gpus if gpus else None, parallel)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(parallel) as pool:
        ended = list(zip(waiting, pool.map(run, waiting), strict=True))
    if failed := [job for job, seconds in ended if seconds is None]:
        log = failed[0].folder / LOG
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(job.name for job in failed)}. The end of {log}:\n"
            + log.read_text(errors="replace")[-SHOWN:]
        )
    return {job.name: seconds for job, seconds in ended}


def _run(job: Job, gpu: int | None, parallel: int) -> float | None:
    """Seconds, or None for a failure that was not expected."""
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(_visible(gpu))
    began = time.monotonic()
    with (job.folder / LOG).open("w") as log:
        command = [sys.executable, *job.arguments]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    seconds = round(time.monotonic() - began, 1)
    text = (job.folder / LOG).read_text(errors="replace")
    expected = job.expected_failure is not None and job.expected_failure in text
    status = "done" if done.returncode == 0 else "failed"
    print(f"{job.name}: {status} after {seconds:.0f} s", flush=True)
    if done.returncode and not expected:
        return None
    write_text(job.folder / RECORD, json.dumps({"status": status, "seconds": seconds}) + "\n")
    return seconds


def _visible(gpu: int) -> str:
    """The GPU's name among those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[gpu] if given else str(gpu)
