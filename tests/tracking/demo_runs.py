"""The runs of the README's pictures: the sky twin as it is, at a lower rate, without average; the second is killed with
`kill -9` and resumed. `python -m tests.tracking.demo_runs FOLDER`
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = (
    "--max-steps 300 --validation.every 25 --validation.sample-every 75 --validation.metric-clips 0 "
    "--validation.sampler.num-inference-steps 25 --checkpoint.every 50 --loop.log-every 5"
)
RUNS = {"lower rate": "--lr 1e-3", "as registered": "", "no average": "--optim.ema=None"}
KILLED = "lower rate"


def command(folder: Path, *words: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    store = ["--store", f"sqlite:///{folder.absolute()}/mlflow.db"]
    return subprocess.Popen([sys.executable, "-m", "registry", *words, *store], env=env)


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, flags in RUNS.items():
        out = folder / name.replace(" ", "-")
        words = ["lvdm-short-sky-tiny", *flags.split(), *SHORT.split(), "--output-dir", str(out), "--run-name", name]
        process = command(folder, "run", *words)
        if name == KILLED:
            while not (out / "checkpoints" / "step-00000100").is_dir():
                time.sleep(0.1)
                assert process.poll() is None
            time.sleep(3)
            process.kill()
            process.wait()
            process = command(folder, "resume", str(out))
        assert process.wait() == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
