"""The wheel ships the recipes."""

import subprocess
import sys
import zipfile
from pathlib import Path


def test_wheel_in_an_empty_folder_runs_a_shipped_recipe(tmp_path):
    """The installed wheel alone, without the checkout: dependencies come from this environment."""
    checkout, site, work = Path(__file__).parents[2], tmp_path / "site", tmp_path / "work"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    code = (
        "import sys, lightning_hyper; from lightning_hyper.cli import main;"
        f"assert lightning_hyper.__file__.startswith({str(site)!r}), lightning_hyper.__file__;"
        "sys.exit(main(['fit', '-c', 'recurrent/gridnavi_rnn_hn', '--frames', '15360']))"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (work / "runs/gridnavi/gridnavi_rnn_hn-seed0/finished.json").exists()
