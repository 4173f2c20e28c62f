"""The comparison behind `recur evaluate-generator`: generated histories beside real ones.

    accounts A  train the generator
    accounts B  are compared with the generated ones; no generator saw them

Beside the generator stand the accounts A themselves, the floor of what a discriminator can find,
and copies: whole histories of A, drawn again. Copies protect nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from model.data.dataset import Dataset
from model.evaluation.discriminators import Discrimination, discriminate
from model.evaluation.history_distances import distances, privacy
from model.evaluation.history_views import Histories, histories_of
from model.evaluation.kept_parts import KeptParts
from model.evaluation.likelihood_attack import likelihood_auc
from model.evaluation.synthetic_training import average_precision_on
from model.generator.generator import Generator
from model.generator.settings import GeneratorError, GeneratorSettings
from model.generator.stream import HistoryStream, Wish, generated_dataset
from model.generator.train import accounts_of, train_generator
from model.training.settings import Report, Reporter, TrainingSettings

GENERATED, COPIES, PEER, REAL = "generator", "copies", "peer", "real"
ACCOUNTS_MIN = 100


class SourceResult(msgspec.Struct, frozen=True, kw_only=True):
    """Measures of one source of histories, against real accounts B.

    Attributes:
        source: :data:`GENERATED`, :data:`COPIES`, :data:`PEER` or :data:`REAL` (accounts A).
        transactions: their number.
        frauds: share of fraud.
        auc_gru, auc_lightgbm: of the discriminators over accounts.
        telling: LightGBM's most telling inputs.
        distances: by quantity.
        privacy: see :func:`model.evaluation.history_distances.privacy`. The generator has
            ``likelihood_auc`` beside, of the attack with its file.
        average_precision: on real accounts, of a network trained on this source.
    """

    source: str
    transactions: int
    frauds: float
    auc_gru: float | None = None
    auc_lightgbm: float | None = None
    telling: list[str] = []
    distances: dict[str, float] = {}
    privacy: dict[str, float] = {}
    average_precision: float | None = None


class GeneratorResults(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a comparison."""

    data: str
    accounts: int
    days: int
    seed: int
    generator: dict[str, Any]
    detector: dict[str, Any]
    sources: list[SourceResult]

    def of(self, source: str) -> SourceResult | None:
        """Return the results of a source, if it was measured."""
        return next((found for found in self.sources if found.source == source), None)


def compare_generator(
    log: Dataset,
    data: str,
    accounts: int,
    settings: GeneratorSettings,
    detector: TrainingSettings | None,
    work: Path,
    peer: Dataset | None = None,
    report: Reporter = lambda _: None,
) -> tuple[GeneratorResults, dict[str, Histories], Generator]:
    """Compare; return also the histories for plots, and the generator.

    Args:
        log: real transactions, of at least twice the accounts.
        data: describes them.
        accounts: number of accounts that train, and that are compared.
        settings: of the generator's training; its seed decides the accounts, too.
        detector: settings of the training on synthetic data. None: it is left out.
        work: a folder that is empty, or as an interrupted run of the same comparison left it.
            The caller removes it.
        peer: histories of another generator that was trained elsewhere.
        report: called often.

    Raises:
        GeneratorError: the data have too few accounts.
    """
    there = np.unique(log.account)
    accounts = min(accounts, len(there) // 2)
    if accounts < ACCOUNTS_MIN:
        raise GeneratorError(
            f"the data have {len(there)} accounts; {2 * ACCOUNTS_MIN} or more are needed: half of"
            " them train, the others are compared with"
        )
    chosen = np.random.default_rng(settings.seed).permutation(there)
    members = accounts_of(log, chosen[:accounts])
    others = accounts_of(log, chosen[accounts : 2 * accounts])
    days = int(others.day[-1]) + 1
    kept = KeptParts(work)
    generator = kept.generator(lambda: train_generator(members, settings, within(report, 0.0, 0.2)))
    report(Report("generating", 0.2))
    wish = Wish(accounts, days, settings.seed)
    logs = {
        REAL: members,
        GENERATED: generated_dataset(HistoryStream(generator, wish)),
        COPIES: _copies(members, settings.seed),
    }
    if peer is not None:
        logs[PEER] = peer
    held = histories_of(others)
    views = {source: histories_of(found) for source, found in logs.items()}
    report(Report("attack by likelihoods", 0.2))
    attack = kept.result("attack", float, lambda: likelihood_auc(generator, members, others))
    attacked = {GENERATED: {"likelihood_auc": attack}}
    results = []
    for place, source in enumerate(logs):
        begin = 0.2 + 0.25 * place / len(logs)
        part = within(report, begin, begin + 0.25 / len(logs))
        found = _measured(source, logs[source], views, held, settings, kept, part)
        private = {**found.privacy, **attacked.get(source, {})}
        results.append(msgspec.structs.replace(found, privacy=private))
    for place, found in enumerate(results):  # last, as it takes longest
        if detector is not None and found.source != COPIES:
            begin = 0.45 + 0.55 * place / len(results)
            part = within(report, begin, begin + 0.55 / len(results))
            log = logs[found.source]
            precision = _precision(found.source, log, others, detector, kept, part)
            results[place] = msgspec.structs.replace(found, average_precision=precision)
    report(Report("done", 1.0))
    return (
        GeneratorResults(
            data=data,
            accounts=accounts,
            days=days,
            seed=settings.seed,
            generator=dict(generator.header.training),
            detector={}
            if detector is None
            else {"epochs": detector.epochs, "hidden_size": detector.hidden_size},
            sources=results,
        ),
        {**views, "held out": held},
        generator,
    )


def _measured(
    source: str,
    log: Dataset,
    views: dict[str, Histories],
    held: Histories,
    settings: GeneratorSettings,
    kept: KeptParts,
    report: Reporter,
) -> SourceResult:
    view, show = views[source], _shown(source, "discriminators", report)
    found = kept.result(
        f"{source}-discriminators",
        Discrimination,
        lambda: discriminate(held, view, settings.seed, show),
    )
    return SourceResult(
        source=source,
        transactions=len(log),
        frauds=float(log.is_fraud.mean()),
        auc_gru=found.gru,
        auc_lightgbm=found.lightgbm,
        telling=found.telling,
        distances=distances(held, view),
        privacy={} if source == REAL else privacy(views[REAL], held, view),
    )


def _precision(
    source: str,
    log: Dataset,
    others: Dataset,
    detector: TrainingSettings,
    kept: KeptParts,
    report: Reporter,
) -> float:
    folder, show = kept.folder / source, _shown(source, "training on it", report)
    folder.mkdir(exist_ok=True)
    return kept.result(
        f"{source}-precision",
        float,
        lambda: average_precision_on(log, others, detector, folder, lambda share, _: show(share)),
    )


def _shown(source: str, stage: str, report: Reporter) -> Callable[[float], None]:
    return lambda share: report(Report(f"{source}: {stage}", share))


def _copies(log: Dataset, seed: int) -> Dataset:
    """Return whole histories drawn with replacement; each copy is an account of its own."""
    row = np.argsort(log.account, kind="stable")
    length = np.bincount(log.account)
    start = np.cumsum(length) - length
    drawn = np.random.default_rng(seed).integers(0, len(length), len(length))
    rows = np.concatenate([row[start[a] : start[a] + length[a]] for a in drawn])
    account = np.repeat(np.arange(len(drawn)), length[drawn]).astype(np.int32)
    order = np.argsort(log.timestamp_ms[rows], kind="stable")
    copied = rows[order]
    merchant = np.unique(log.merchant[copied], return_inverse=True)[1].astype(np.int32)
    return Dataset(
        account[order],
        merchant,
        log.amount[copied],
        log.timestamp_ms[copied],
        log.label[copied],
        log.scenario[copied],
        currency=log.currency,
    )


def within(report: Reporter, begin: float, end: float) -> Reporter:
    """Return a reporter of a part that takes the whole's progress from begin to end."""
    return lambda r: report(Report(r.stage, begin + (end - begin) * r.done, r.note))
