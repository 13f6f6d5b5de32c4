"""A whole run: every scheme in turn, and the folder that keeps what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trady_kernels.atomic_write import alone_in
from trady_kernels.cost import Budget
from trady_kernels.data import DataSet, load_data
from trady_kernels.models.front import Front
from trady_kernels.models.loading import load_model
from trady_kernels.provenance import describe
from trady_kernels.selection import Resampling
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.loop import own_checkpoint, sizes_of, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.regimes import check_spec
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.run_folder import RunFolder
from trady_kernels.training.settings import Settings, plain


@dataclass
class Run:
    """A run whose settings, data and folder have been checked and whose training may start.

    Args:
        settings: of the run.
        data: what it trains and tests on, made ready for the network.
        front: what makes the network's input of it.
        folder: where its files go.
        provenance: command, versions, commit, machine, start.
        results: of the schemes that have at least one epoch.
    """

    settings: Settings
    data: DataSet
    front: Front
    folder: RunFolder
    provenance: dict[str, Any]
    results: dict[str, SchemeResult]

    def train(self, observer: Observer) -> list[SchemeResult]:
        """Train every scheme, or what is left of it, and keep the folder up to date.

        Raises:
            Diverged: the loss became infinite or NaN.
            OSError: a file could not be written; the files before are whole.
            ValueError: another process trains in the folder; or the network shows a setting to be wrong, and the folder
                is free again where nothing had been trained.
            KeyboardInterrupt: the user interrupted; the last epoch's checkpoint is whole.
        """
        torch.set_num_threads(self.settings.threads)
        with alone_in(self.folder.path):
            self.write_results()
            try:
                for scheme in self.settings.schemes:
                    self.results[scheme] = train_scheme(
                        scheme,
                        self.settings,
                        self.data,
                        self.folder.checkpoint(scheme),
                        _Recording(self, observer),
                        resume=True,
                    )
                    self.write_results()
            except ValueError:
                if not self.folder.checkpoints():
                    self.folder.results.unlink()
                raise
        return list(self.results.values())

    def to_json(self) -> dict[str, Any]:
        """Everything about the run as plain values: what ``results.json`` holds."""
        return {
            "settings": self.settings.to_json(),
            "data": _data_facts(self.data),
            **self.provenance,
            "schemes": {scheme: result.to_json() for scheme, result in self.results.items() if result.epochs},
        }

    def write_results(self) -> None:
        """Bring ``results.json`` up to date."""
        self.folder.write(self.to_json())


class _Recording(Observer):
    """Passes on what an observer is told, and brings ``results.json`` up to date after every epoch."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self._run = run
        self._observer = observer

    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        self._run.results[scheme] = result
        self._observer.on_scheme(scheme, result, steps_per_epoch)

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        self._observer.on_selection(regime, batches)

    def on_gradients(self, model: nn.Module) -> None:
        self._observer.on_gradients(model)

    def on_step(self, loss: float, accuracy: float) -> None:
        self._observer.on_step(loss, accuracy)

    def on_epoch(self, figures: EpochFigures) -> None:
        self._run.write_results()
        self._observer.on_epoch(figures)


def start_run(settings: Settings, folder: Path) -> Run:
    """Check everything that a new run needs, and make its folder.

    Raises:
        ValueError, OSError, ModuleNotFoundError: something is wrong or missing; nothing is left behind but
            an empty folder.
    """
    data, front = _check(settings)
    run_folder = RunFolder(folder)
    run_folder.create()
    torch.set_num_threads(settings.threads)
    provenance = describe(torch.device(settings.device))
    return Run(settings, data, front, run_folder, provenance, {})


def resume_run(folder: Path, asked: dict[str, Any]) -> Run:
    """Take up a run that was interrupted.

    Args:
        folder: of the run.
        asked: settings that the user gave again; each must be the run's.

    Raises:
        ValueError: a setting, or the data, is not the run's, or a file is damaged.
        FileNotFoundError: the folder holds no run.
    """
    run_folder = RunFolder(folder)
    content = run_folder.read()
    settings = Settings.from_json(content["settings"])
    for name, value in asked.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"{name}: got {plain(value)}, but the run in {folder} has {plain(getattr(settings, name))}; "
                "leave the setting away to resume, or start another run"
            )
    data, front = _check(settings)
    if (now := _data_facts(data)) != content["data"]:
        raise ValueError(
            f"data: {settings.data} is no longer what the run in {folder} was started with "
            f"({now['train_samples']} training samples now, {content['data']['train_samples']} then); "
            "bring it back, or start another run"
        )
    for scheme in settings.schemes:
        if (path := run_folder.checkpoint(scheme)).exists():
            own_checkpoint(path, settings)
    provenance = {key: content[key] for key in ("command", "started", "versions", "commit", "machine")}
    results = {scheme: SchemeResult.from_json(row) for scheme, row in content["schemes"].items()}
    return Run(settings, data, front, run_folder, provenance, results)


def load_task(settings: Settings) -> DataSet:
    """The data that the settings ask for.

    Raises:
        ValueError, FileNotFoundError: they are not to be had.
    """
    return load_data(
        settings.data,
        image_size=settings.image_size,
        train_samples=settings.train_samples,
        test_samples=settings.test_samples,
        validation_share=settings.validation_share,
    )


def _check(settings: Settings) -> tuple[DataSet, Front]:
    """Find what is wrong with the settings before anything is written, the slow checks last."""
    Budget.parse(settings.budget)
    Resampling.parse(settings.resampling)
    for scheme in settings.schemes:
        check_spec(Spec.parse(scheme), settings)
    check_device(settings.device)
    data = load_task(settings)
    loaded = load_model(
        settings.model,
        len(data.classes),
        weights=settings.weights,
        seed=settings.seed,
        sizes=sizes_of(settings),
    )
    return loaded.prepare(data), loaded.front


def check_device(name: str) -> None:
    """Check where a user wants to train.

    Raises:
        ValueError: no such device, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: got {name!r}, but torch {torch.__version__} finds no NVIDIA GPU here; use cpu"
        )


def _data_facts(data: DataSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "classes": list(data.classes),
        "train_samples": len(data.train),
        "test_samples": len(data.test),
        "train_checksum": data.train.checksum(),
        "test_checksum": data.test.checksum(),
    }
