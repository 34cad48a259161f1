"""The wheel holds the package with its data, and works where nothing else of the project is."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from launch import ROOT


def test_wheel_has_its_data_and_imports_elsewhere(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "llava_prune").rglob("*.py")}
    assert sources <= set(names)
    data_files = ("presets/avg128.yaml", "visualize/page.html", "testbed/base/vision_tower/config.json")
    for data in (*data_files, "testbed/base/model.safetensors"):
        assert f"llava_prune/{data}" in names
    assert not any(name.startswith(("tests", "scripts")) for name in names)
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert b"[lmms_eval.models]\nllava_prune = " in zipfile.ZipFile(wheel).read(entry_points)
    assert wheel.stat().st_size < 12e6

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    # torch and the rest from here, the package itself from the wheel alone
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "host.pth").write_text(
        str(Path(sys.executable).parent.parent / "lib" / site.parent.name / "site-packages")
    )
    program = (
        "import llava_prune, llava_prune.testbed.install as i, sys\n"
        f"assert not llava_prune.__file__.startswith({str(ROOT)!r})\n"
        "assert 'transformers' not in sys.modules and 'deepspeed' not in sys.modules\n"
        "print(llava_prune.PruneConfig.load('avg128').target_token_num, i.install_base('.'))"
    )
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("128") and (tmp_path / "llava-mosaic-tiny" / "config.json").is_file()
