"""Runs `quickstart.smk` with a live view of its stages, then prints the table of methods.

Snakemake does the work; this file only starts it, watches the stages' logs, and never sits silent for long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

OUT = Path("runs/quickstart")
STAGES = {
    "pairs": "8,000 pairs labelled by gold, 25 % of the labels wrong",
    "reward": "proxy reward model trained on them",
    "dpo_small_beta": "DPO, beta 0.02: travels far",
    "dpo_large_beta": "DPO, beta 0.2: stays near",
    "rpo": "RPO, beta 0.02 with an SFT anchor",
    "ppo": "PPO on that reward model, no KL penalty",
    "ppo_ensemble": "PPO on the worst case of five",
    "ppo_xi": "PPO with two reward models held at thresholds",
    "reward_ensemble": "five reward models from 1,000 of the pairs",
    "reward_moe": "DMoERM from the same 1,000 pairs",
    "bon": "best of up to 128 samples by each of them",
    "report": "one HTML report",
}
SILENCE = 4.0  # seconds between two signs of life where there is no terminal


@dataclass(frozen=True)
class View:
    """What the stages' logs say at one moment."""

    started: float

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, state and last line of each stage."""
        return [(name, *self._state(name)) for name in STAGES]

    def _state(self, name: str) -> tuple[str, str]:
        log = OUT / "logs" / f"{name}.log"
        done = (OUT / "logs" / f"{name}.done").exists()
        if not log.exists():
            return ("done" if done else "waiting"), STAGES[name]
        return ("done" if done else "running"), (STAGES[name] if done else last_line(log))

    def table(self) -> Table:
        """Return the view as a table for the terminal."""
        table = Table(title=f"quickstart, {time.monotonic() - self.started:.0f} s", title_justify="left", expand=True)
        for column, width in (("stage", 15), ("state", 8)):
            table.add_column(column, width=width, no_wrap=True)
        table.add_column("what it does, or its last line", no_wrap=True, overflow="ellipsis")
        styles = {"done": "green", "running": "yellow", "waiting": "dim"}
        for name, state, text in self.rows():
            table.add_row(name, f"[{styles[state]}]{state}[/]", text)
        return table

    def line(self) -> str:
        """Return the view as one line, for logs."""
        parts = [f"{name}: {text if state == 'running' else state}" for name, state, text in self.rows()]
        return f"[{time.monotonic() - self.started:4.0f} s] " + " | ".join(
            p for p in parts if not p.endswith("waiting")
        )


def last_line(log: Path) -> str:
    """Return the newest non-empty line of a log; progress bars rewrite theirs after a carriage return."""
    tail = log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in tail.split("\n") if line.strip()]
    return lines[-1][:160] if lines else "starting"


def watch(process: subprocess.Popen[bytes], console: Console) -> None:
    """Show the stages until the process ends: a live table in a terminal, a line every few seconds elsewhere."""
    view = View(time.monotonic())
    if console.is_terminal:
        with Live(view.table(), console=console, refresh_per_second=4) as live:
            while process.poll() is None:
                time.sleep(0.5)
                live.update(view.table())
            live.update(view.table())
        return
    while process.poll() is None:
        print(view.line(), flush=True)
        try:
            process.wait(SILENCE)
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    """Run the quickstart and return its exit status."""
    (OUT / "logs").mkdir(parents=True, exist_ok=True)
    cores = str(min(2, os.cpu_count() or 1))
    command = [sys.executable, "-m", "snakemake", "--snakefile", "studies/quickstart.smk", "--cores", cores]
    with (OUT / "logs" / "snakemake.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime"], stdout=log, stderr=log
        )
        try:
            watch(process, Console())
        except KeyboardInterrupt:
            process.terminate()
            print("stopped; the same command continues", file=sys.stderr)
            return 1
    if process.returncode:
        print(f"a stage failed; its log is in {OUT / 'logs'}:", file=sys.stderr)
        print((OUT / "logs" / "snakemake.log").read_text()[-2000:], file=sys.stderr)
        return 1
    print((OUT / "logs" / "report.log").read_text())
    print(f"open {OUT / 'report.html'} in a browser; TensorBoard: tensorboard --logdir {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
