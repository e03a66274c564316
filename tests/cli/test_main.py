import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_foreign_package_of_our_name_is_refused_with_an_explanation(tmp_path: Path) -> None:
    foreign = tmp_path / "trainer"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("raise RuntimeError('the foreign package was imported')", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "`trainer`" in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
