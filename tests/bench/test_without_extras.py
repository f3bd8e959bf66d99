"""With torch, triton and numpy alone the jobs run, and say what takes the place of what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.environment import REPOSITORY

# Everything that the extras bring. Run in a process of its own: here they are imported already.
PROGRAM = """
import sys

class Missing:
    NAMES = {"matplotlib", "PIL", "skimage", "tqdm", "hypothesis", "pytest_benchmark", "timm", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in Missing.NAMES else find(name, *rest)

import torch
torch.set_num_threads(1)
from bench.__main__ import main
from bench.model import machine
machine.SIZES["cpu"] = (1024, 16)
from step_kernels.model.vit import PRESETS
PRESETS["nano"] = {"embed_dim": 48, "depth": 3, "num_heads": 3}
folder = sys.argv[1]
small = ["--device", "cpu", "--size", "64", "--batch", "2", "--repeats", "2", "--out", folder]
status = [
    main(["--model", "nano", "--tokens", "1.5", "--exits", "2", *small]),
    main(["model", "--model", "nano", "--classes", "5", "--layout", "realistic", *small]),
    main(["kernels", "--model", "tiny", "--classes", "5", "--op", "merge_tokens", "--compile-minutes", "0", *small]),
    main(["report", folder]),
]
assert not Missing.NAMES & {name.partition(".")[0] for name in sys.modules}
sys.exit(max(status))
"""


def test_all_jobs_run_without_the_extras(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "model.json", "kernels.json"}
    for text in (
        "photographs: generated 1, generated 2",
        "no picture: matplotlib is not installed",
        "Realistic layouts are those of no photographs: Pillow is not installed",
    ):
        assert text in finished.stdout
    assert "generated pictures take their place" in finished.stderr
    assert "no plots: matplotlib is not installed" in finished.stderr
    assert "checking: done" in finished.stderr
    assert '"images": "generated"' in (tmp_path / "bench.json").read_text(encoding="utf-8")
