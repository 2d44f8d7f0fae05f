"""Exports of a living run: every so often its model in Hugging Face's format, beside the training."""

import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmgpt.core.log import Metrics, console, printable
from mmgpt.dist import hosts
from mmgpt.interop.convert import MEMORY, check_exportable, to_hugging_face
from mmgpt.train.run import Opened, Run, open_run

FOLDER = "exports"


class Export(contextlib.AbstractContextManager["Export"]):
    """Writes `exports/STEP` in the run folder whenever it is called, whole or not at all.

    The caller waits only until the weights are copied to the host. A failure is told on the console and never ends the
    run; an export that is due while the last one is still written is left out. All processes call it; the lead writes.
    """

    def __init__(self, run: Run, run_dir: Path) -> None:
        """ConfigError where Hugging Face folders hold no such model."""
        check_exportable(run, run_dir)
        self._run_dir = run_dir
        self._writing: threading.Thread | None = None
        self._vision: Opened | None = None

    def __call__(self, opened: Opened, metrics: Metrics) -> None:
        if self._vision is None and (self._run_dir / MEMORY).exists() and (self._run_dir / "vision").exists():
            self._vision = _on_host(open_run(self._run_dir / "vision"))  # which the run reads, and does not change
        models = {self._run_dir: _on_host(opened)}
        if self._vision is not None:
            models[self._run_dir / "vision"] = self._vision
        if not hosts.is_lead():
            return
        if self._writing is not None and self._writing.is_alive():
            console.print(f"no export of step {opened.step}: the one before is still written", style="red")
            return
        self._writing = threading.Thread(target=self._write, args=(opened.step, models), name=f"export {opened.step}")
        self._writing.start()

    def __exit__(self, *exception: object) -> None:
        """Waits for the export that is being written."""
        if self._writing is not None:
            self._writing.join()

    def _write(self, step: int, models: dict[Path, Opened]) -> None:
        try:
            to_hugging_face(self._run_dir, self._run_dir / FOLDER / str(step), overwrite=True, models=models)
        except Exception as e:  # hours of training are worth more than an export
            console.print(f"no export of step {step}: {printable(f'{type(e).__name__}: {e}')}", style="red")


def _on_host(opened: Opened) -> Opened:
    """The same with numpy arrays, which the lead alone has where there are several processes."""

    def fetched(leaf: Any) -> np.ndarray | None:
        # A view where the CPU is the device: JAX does not write into what is still looked at.
        whole = np.asarray(leaf) if hosts.process_count() == 1 else multihost_utils.process_allgather(leaf, tiled=True)
        return whole if hosts.is_lead() else None

    params, variables = jax.tree.map(fetched, (opened.params, opened.variables))
    return dataclasses.replace(opened, params=params, variables=variables)
