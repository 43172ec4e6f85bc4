"""The architecture as a test that fails: who may import whom, held by the contracts in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lint(config: Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run(
        [*command, "--config", str(config), "--no-cache"], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_imports_keep_the_contracts():
    told = lint(ROOT / "pyproject.toml", ROOT)
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_contract_can_break(tmp_path):
    """An import from below upwards is found, so that the test above is not silent for another reason."""
    for package, text in {"low": "import high.a\n", "high": ""}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "a.py").write_text(text)
    config = tmp_path / "contracts.toml"
    config.write_text(
        '[tool.importlinter]\nroot_packages = ["low", "high"]\n'
        '[[tool.importlinter.contracts]]\nname = "up"\ntype = "layers"\nlayers = ["high", "low"]\n'
    )
    told = lint(config, tmp_path)
    assert told.returncode != 0 and "low.a -> high.a" in told.stdout, told.stdout + told.stderr


def test_the_command_line_answers_without_heavy_imports():
    """--help must not wait for torch, MLflow or DVC; Prefect is what the module is about."""
    probe = (
        "import sys, runpy; sys.argv = ['align', '--help']\n"
        "try: runpy.run_module('flows.align', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'dvc', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    told = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert "--target" in told.stdout
