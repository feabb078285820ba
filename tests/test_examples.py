"""The examples of the pages run as scripts, in small, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| ([\d.]+)% \(.*?\) \| ([\d.]+)% \(.*?\) \|$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # it trains for minutes on a slow processor
def test_navit_classification(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "navit_classification.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--picture", tmp_path / "accuracy.png"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [(int(side), float(navit), float(vit)) for side, navit, vit in ROW.findall(done.stdout)]
    assert [side for side, *_ in rows] == [16, 20, 24, 32, 40, 48]
    assert all(0 <= share <= 100 for _, *shares in rows for share in shares)
    assert max(navit for _, navit, _ in rows) > 20  # guessing gives 10 %
    assert re.findall(r"^(NaViT|ViT), seed 0: [\d,]+ images seen", done.stdout, re.MULTILINE) == ["NaViT", "ViT"]
    assert Image.open(tmp_path / "accuracy.png").width > 300
