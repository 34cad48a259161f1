"""Real trainings in processes of their own: the deepspeed launcher, LLaVA's own flags, the testbed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(data, out, processes, stage, steps, **flags):
    """The command line of one training; `stage` None runs without DeepSpeed, in one process."""
    model = data / "llava-mosaic-tiny"
    settings = {
        "prune_config": "mosaic",
        "model_name_or_path": model,
        "version": "v1",
        "data_path": data / "train.json",
        "image_folder": data,
        "vision_tower": model / "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "bf16": False,
        "output_dir": out,
        "num_train_epochs": 3,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "model_max_length": 512,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    launcher = [sys.executable, "-m", "llava_prune.train"]
    if stage is not None:
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--master_port",
            str(free_port()),
            "--num_gpus",
            str(processes),
        ]
        launcher += ["--module", "llava_prune.train", "--deepspeed", str(ROOT / f"zero_configs/zero{stage}.json")]
    arguments = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return launcher + arguments


def environment():
    """Variables of a training process."""
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {
        **os.environ,
        **accelerator,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def shared_memory_freed(words):
    """DeepSpeed leaves the memory that its processes shared, 140 MB a run, under the name of their port."""
    try:
        yield
    finally:
        if "--master_port" in words:
            port = words[words.index("--master_port") + 1]
            for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
                path.unlink()


def train(data, out, processes=2, stage=2, steps=5, timeout=240, **flags):
    """Run to the end; returns the log history. A failure shows the end of the output."""
    words = command(data, out, processes, stage, steps, **flags)
    with shared_memory_freed(words):
        done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return history(out)


def train_and_kill(data, out, when, timeout=240, **flags):
    """Start, and SIGKILL every process of the run as soon as `when()` is true."""
    words = command(data, out, **flags)
    with shared_memory_freed(words):
        process = subprocess.Popen(
            words,
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + timeout
        while not when():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def history(out):
    """Logged steps, oldest first."""
    log = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def write_data(folder, testbed, samples):
    """A data folder over `testbed`'s pictures and model, with its own `train.json`."""
    folder.mkdir()
    for name in ("images", "llava-mosaic-tiny"):
        (folder / name).symlink_to(testbed / name)
    (folder / "train.json").write_text(json.dumps(samples))
    return folder
