"""What recorded runs say beside the theory: predicted and measured losses, durations, and what an effect is made of.

Stores hold published stages; wherever q is known, losses and rewards are expectations over it, on the dev split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize.elementwise import find_root
from scipy.special import expit

from sftrl_utils import records, tabular
from sftrl_utils.records import read_record, second_stage

# Ways to reach both objectives, as published. All but the first two have seen as many batches of expert data, and of
# samples, as one another.
METHODS: dict[str, dict[str, Any]] = {
    "SFT alone": {"store": ".", "pipeline": "sft"},
    "RL alone": {"store": ".", "pipeline": "grpo"},
    "SFT, then RL": {"store": "joint", "pipeline": "sft_then_rl"},
    "RL, then SFT": {"store": ".", "pipeline": "rl_then_sft"},
    "SFT, then RL, β = 0.1": {"store": ".", "pipeline": "sft_then_rl", "beta": 0.1},
    "joint, μ = 0.1": {"store": "joint", "pipeline": "joint", "sft_weight": 0.1},
    "joint, μ = 0.3": {"store": "joint", "pipeline": "joint", "sft_weight": 0.3},
    "joint, μ = 1": {"store": "joint", "pipeline": "joint", "sft_weight": 1.0},
    "joint, μ = 3": {"store": "joint", "pipeline": "joint", "sft_weight": 3.0},
    "by turns": {"store": "joint", "pipeline": "interleaved"},
    "replay": {"store": "joint", "pipeline": "sft_then_interleaved"},
    "halfway between the weights": {"store": "joint", "pipeline": "sft_then_rl_merged", "interpolation": 0.5},
}
BETAS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of notebooks/sweeps/beta.yaml
RL_LENGTHS = (12, 25, 50, 100, 200, 400)  # of notebooks/sweeps/duration.yaml


def answers(store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any) -> pd.DataFrame:
    """What models before and after the last stage of `pipeline` answer, one row a seed, split and sentence.

    Columns `seed`, `split`, `label`, `q`, `phenomenon`, and log-probabilities `before_unacceptable`,
    `before_acceptable`, `after_unacceptable`, `after_acceptable`. `where` and errors as `records.second_stage`.
    """
    tables = []
    stages = second_stage(store, pipeline, preset, beta, **where).groupby("seed")["stage"].first()
    for seed, stage in stages.items():
        record, own = read_record(store / stage), records.read_answers(store / stage)
        first = len(record.kinds) == 1
        earlier = own if first else records.read_answers(store / record.parent)
        before = earlier[earlier["point"] == ("start" if first else "end")].reset_index(drop=True)
        after = own[own["point"] == "end"].reset_index(drop=True)
        columns = {f"{when}_{name}": rows[name] for when, rows in (("before", before), ("after", after))
                   for name in ("unacceptable", "acceptable")}  # fmt: skip
        tables.append(after[["split", "label", "q", "phenomenon"]].assign(seed=seed, **columns))
    return pd.concat(tables, ignore_index=True)


def log_policies(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`log_q`, `log_s` (before), `log_p` (after), each (N, 2), over the two answers alone, and weights 1/N."""
    q = rows["q"].to_numpy(dtype=float)
    log_q = np.log(np.stack([1 - q, q], axis=1))
    names = ("unacceptable", "acceptable")
    log_s, log_p = (
        _normalised(rows[[f"{when}_{name}" for name in names]].to_numpy(dtype=float)) for when in ("before", "after")
    )
    return log_q, log_s, log_p, np.full(len(rows), 1 / len(rows))


def _normalised(log_p: np.ndarray) -> np.ndarray:
    return log_p - np.logaddexp(log_p[:, :1], log_p[:, 1:])


def noisy_fixed_point(log_s: np.ndarray, log_q: np.ndarray, beta: float, group_size: int) -> np.ndarray:
    """Where GRPO with reverse KL to s of weight `beta` rests if labels are drawn from q anew, log p of shape (N, 2).

    A group is rewarded by one drawn label, so the expected update is (2q − 1) c_G(p) ∇p (T7, `tabular.group_weight`):
    the log-odds are those of s plus (2q − 1) c_G(p) / β.
    """
    odds, pull = log_s[:, 1] - log_s[:, 0], 2 * np.exp(log_q[:, 1]) - 1
    most = np.abs(pull) * tabular.group_weight(1.0, group_size) / beta + 1e-9  # c_G is largest at 0 and 1

    def excess(z, odds, pull):
        return odds + pull * tabular.group_weight(expit(z), group_size) / beta - z

    z = find_root(excess, (odds - most, odds + most), args=(odds, pull)).x
    return -np.logaddexp(0, np.stack([z, -z], axis=1))


def fitted_duration(log_s: np.ndarray, log_p: np.ndarray, reward: np.ndarray) -> tuple[float, float]:
    """Least-squares η of log(p/s) on η r, centred within each of N prompts, and the share of variance it explains.

    A policy that RL for the time η made of s (`tabular.gibbs`) has share 1.
    """
    ratio, reward = ((part - part.mean(-1, keepdims=True)).ravel() for part in (log_p - log_s, reward))
    eta = float(ratio @ reward / (reward @ reward))
    return eta, float(1 - ((ratio - eta * reward) ** 2).sum() / (ratio @ ratio))


def loss_predictions(store: Path, betas: Sequence[float], preset: str = "tiny", **where: Any) -> pd.DataFrame:
    """SFT loss after RL, predicted and measured, nats per response on dev: one row a β and seed.

    From the probabilities s of the SFT model and the expected reward ±(2q − 1): `gibbs` is the loss of the exact
    optimum of 1/β, `fixed_point` that of GRPO (`noisy_fixed_point`), `fitted` that of the Gibbs policy whose duration
    `eta` fits the trained one best, `gibbs_share` the variance of its log-ratio that it explains. `before` is L(s).
    """
    rows = []
    for beta in betas:
        record = _first_record(store, "sft_then_rl", preset, beta, **where)
        dev = answers(store, "sft_then_rl", preset, beta, **where).query("split == 'dev'")
        for seed, part in dev.groupby("seed"):
            log_q, log_s, log_p, weights = log_policies(part)
            reward = tabular.label_reward(log_q)
            eta, share = fitted_duration(log_s, log_p, reward)
            row = {"beta": beta, "seed": seed, "before": tabular.sft_loss(log_s, log_q, weights)}
            row["measured"] = tabular.sft_loss(log_p, log_q, weights)
            if beta:
                row["gibbs"] = tabular.sft_loss(tabular.gibbs(log_s, reward, 1 / beta), log_q, weights)
                rest = noisy_fixed_point(log_s, log_q, beta, record.config["group_size"])
                row["fixed_point"] = tabular.sft_loss(rest, log_q, weights)
            row["fitted"] = tabular.sft_loss(tabular.gibbs(log_s, reward, max(eta, 0.0)), log_q, weights)
            rows.append(row | {"eta": eta, "gibbs_share": share})
    return pd.DataFrame(rows)


def rl_lengths(store: Path, preset: str = "tiny") -> list[int]:
    """Numbers of RL updates of the valid `sft_then_rl` stages in `store`, β = 0."""
    found = [record for record in records.read_records(store) if record.valid and record.beta == 0]
    wanted = [record for record in found if (record.pipeline, record.preset) == ("sft_then_rl", preset)]
    return sorted({record.config["rl_steps"] for record in wanted})


def threshold_signs(store: Path, preset: str = "tiny") -> pd.DataFrame:
    """The sign of the change of the SFT loss under RL beside the threshold condition (T2): one row a length and seed.

    `lead` is δ = R(q) − R(s): up to 0, RL never lowers the loss; above it, RL lowers the loss up to the duration
    `break_even` and raises it after. `eta` is the duration fitted to the trained policy, `predicted` and `measured`
    the signs (±1) of the change.
    """
    rows = []
    for count in rl_lengths(store, preset):
        dev = answers(store, "sft_then_rl", preset, rl_steps=count).query("split == 'dev'")
        for seed, part in dev.groupby("seed"):
            log_q, log_s, log_p, weights = log_policies(part)
            reward = tabular.label_reward(log_q)
            eta, _ = fitted_duration(log_s, log_p, reward)
            turn = float(tabular.break_even(log_q, log_s, reward, weights))
            lead = tabular.mean_reward(log_q, reward, weights) - tabular.mean_reward(log_s, reward, weights)
            change = tabular.sft_loss(log_p, log_q, weights) - tabular.sft_loss(log_s, log_q, weights)
            signs = {"predicted": 1 if eta > turn else -1, "measured": int(np.sign(change))}
            rows.append({"rl_steps": count, "seed": seed, "lead": lead, "eta": eta, "break_even": turn, **signs})
    return pd.DataFrame(rows)


def stopping_steps(store: Path, preset: str = "tiny") -> pd.DataFrame:
    """The RL step at which the SFT loss on dev is least, and the one the theory says: index `seed`.

    T2's rule: stop when the model's reward equals the data's, here the reward on the labels of dev of answers drawn
    from q. `predicted` is the first evaluated step whose reward reaches it, `measured` that of the least loss. Runs of
    different lengths of one seed are one run, evaluated at different steps.
    """
    rows = {}
    table = records.metrics_table(store, pipeline="sft_then_rl", preset=preset, beta=0.0, valid=True)
    for seed, part in table.sort_values("step").groupby("seed"):
        sentences = records.read_answers(store / part["stage"].iloc[0]).query("split == 'dev' and point == 'end'")
        q, label = sentences["q"].to_numpy(dtype=float), sentences["label"].to_numpy()
        goal = (2 * np.where(label == 1, q, 1 - q) - 1).mean()
        reached = part[part["mean_reward_dev"] >= goal]
        predicted = reached["step"].iloc[0] if len(reached) else np.inf
        measured = part["step"].iloc[part["sft_loss_dev"].argmin()]
        loss = {"start": part["sft_loss_dev"].iloc[0], "least": part["sft_loss_dev"].min()}
        rows[seed] = {"predicted": predicted, "measured": measured, **loss, "end": part["sft_loss_dev"].iloc[-1]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("seed")


def parts_of_the_loss(
    store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any
) -> pd.DataFrame:
    """The change of the loss over the two answers on dev, nats per response, in two parts: index `seed`.

    `confidence` is what one temperature takes back, fitted before and after; `judgement` is what is left, the change
    of the tempered loss. `mcc` and `acceptable_rate` are changes of the likelier answer's: a constant answer has
    MCC 0 and rate 1.
    """
    ends = _report_ends(store, pipeline, preset, beta, **where)
    change = ends["after"] - ends["before"]
    parts = {"total": change["answer_loss"], "judgement": change["answer_loss_tempered"]}
    table = pd.DataFrame(parts).assign(confidence=lambda t: t["total"] - t["judgement"])
    table["mcc"], table["acceptable_rate"] = change["mcc"], change["acceptable_rate"]
    return table[["total", "confidence", "judgement", "mcc", "acceptable_rate"]]


def parts_of_the_reward(
    store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any
) -> pd.DataFrame:
    """The change of the mean reward on dev in two parts: index `seed`.

    `answers` is the change of the reward of the likelier answer, 2 × accuracy − 1; `confidence` is what is left, a
    policy that samples being right less often than its likelier answer. `mcc` and `acceptable_rate` as above.
    """
    rows = answers(store, pipeline, preset, beta, **where).query("split == 'dev'")
    table = {}
    for seed, part in rows.groupby("seed"):
        label = part["label"].to_numpy()
        values = {}
        for when in ("before", "after"):
            log_p = part[[f"{when}_unacceptable", f"{when}_acceptable"]].to_numpy(dtype=float)
            values[when] = (
                (2 * np.exp(log_p[np.arange(len(label)), label]) - 1).mean(),
                (2 * (log_p.argmax(axis=1) == label) - 1).mean(),
            )
        total, greedy = np.subtract(values["after"], values["before"])
        table[seed] = {"total": total, "answers": greedy, "confidence": total - greedy}
    ends = _report_ends(store, pipeline, preset, beta, **where)
    change = (ends["after"] - ends["before"])[["mcc", "acceptable_rate"]]
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("seed").join(change)


def by_phenomenon(store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any) -> pd.DataFrame:
    """Changes over the last stage, one row a split, phenomenon and seed: `sentences`, `loss` (per response), `reward`.

    Both are of the drawn labels.
    """
    rows = answers(store, pipeline, preset, beta, **where)
    for when in ("before", "after"):
        right = np.where(rows["label"] == 1, rows[f"{when}_acceptable"], rows[f"{when}_unacceptable"])
        rows[f"{when}_loss"], rows[f"{when}_reward"] = -right, 2 * np.exp(right) - 1
    for name in ("loss", "reward"):
        rows[name] = rows[f"after_{name}"] - rows[f"before_{name}"]
    groups = rows.groupby(["split", "phenomenon", "seed"], observed=True)
    return groups.agg(sentences=("loss", "size"), loss=("loss", "mean"), reward=("reward", "mean")).reset_index()


def shares_by_phenomenon(rows: pd.DataFrame) -> pd.DataFrame:
    """How far RL tilted the sentences of each phenomenon alike, from `answers`: one row a seed and phenomenon.

    `share` is what the duration fitted to all of a seed's sentences explains of the log-ratio within the phenomenon,
    `own_share` what the phenomenon's own, `own_eta`, does (`fitted_duration`).
    """
    fits = []
    for seed, part in rows.groupby("seed"):
        log_q, log_s, log_p, _ = log_policies(part)
        reward = tabular.label_reward(log_q)
        eta, _ = fitted_duration(log_s, log_p, reward)
        for phenomenon in part["phenomenon"].unique():
            own = (part["phenomenon"] == phenomenon).to_numpy()
            ratio, tilt = (table[own] - table[own].mean(-1, keepdims=True) for table in (log_p - log_s, reward))
            own_eta, own_share = fitted_duration(log_s[own], log_p[own], reward[own])
            share = 1 - ((ratio - eta * tilt) ** 2).sum() / (ratio**2).sum()
            fits.append((seed, phenomenon, eta, own_eta, share, own_share))
    return pd.DataFrame(fits, columns=["seed", "phenomenon", "eta", "own_eta", "share", "own_share"])


def plane(results: Path, methods: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Where each of `methods` ends on dev: one row a seed, columns `method`, `seed`, `reward`, `loss` and `excess`.

    A method is a store below `results` (`store`), a `pipeline`, and further arguments of `answers`. Only seeds that all
    of them have. Reward and loss (nats per response) are over q; `excess` is the distance of the loss above the least
    that any policy of at least this reward has (T6): below the reward of q, above the loss of q itself.
    """
    rows = []
    for name, runs in methods.items():
        where = dict(runs)
        table = answers(results / where.pop("store"), where.pop("pipeline"), **where).query("split == 'dev'")
        for seed, part in table.groupby("seed"):
            log_q, _, log_p, weights = log_policies(part)
            r = tabular.label_reward(log_q)
            row = {"reward": tabular.mean_reward(log_p, r, weights), "loss": tabular.sft_loss(log_p, log_q, weights)}
            target = max(row["reward"], tabular.mean_reward(log_q, r, weights))
            row["excess"] = row["loss"] - tabular.frontier(log_q, r, weights, target)[0]
            rows.append({"method": name, "seed": seed, **{column: float(value) for column, value in row.items()}})
    found = pd.DataFrame(rows)
    common = found.groupby("seed")["method"].nunique()
    return found[found["seed"].isin(common.index[common == len(methods)])].reset_index(drop=True)


def frontier_line(store: Path, points: int = 60) -> pd.DataFrame:
    """The least SFT loss at each expected reward from that of q on (T6), columns `reward` and `loss`.

    Over the dev sentences of the SFT stages in `store`.
    """
    rows = answers(store, "sft").query("split == 'dev'")
    log_q, _, _, weights = log_policies(rows[rows["seed"] == rows["seed"].min()])
    reward = tabular.label_reward(log_q)
    least = float(tabular.mean_reward(log_q, reward, weights))
    most = float(tabular.average(reward.max(-1), weights))
    # Closer towards the end, where the line turns upwards.
    targets = most - (most - least) * (1 - np.linspace(0, 0.995, points)) ** 2
    loss = [float(tabular.frontier(log_q, reward, weights, target)[0]) for target in targets]
    return pd.DataFrame({"reward": targets, "loss": loss})


def gradient_cosines(folder: Path, *stores: Path) -> pd.DataFrame:
    """`cosines.parquet` of `folder` (see `alignment.measure`) with seed, β, pipeline and length of each stage."""
    table = pd.read_parquet(folder / "cosines.parquet")
    found = {record.stage: record for store in stores for record in records.read_records(store)}
    known = table[table["stage"].isin(found)]
    columns = {
        "seed": known["stage"].map(lambda name: found[name].seed),
        "beta": known["stage"].map(lambda name: found[name].beta),
        "pipeline": known["stage"].map(lambda name: found[name].pipeline),
        "rl_steps": known["stage"].map(
            lambda name: found[name].config["rl_steps"] if found[name].kind == "grpo" else 0
        ),
    }
    return known.assign(**columns)


def beside_the_paper(results: Path) -> pd.DataFrame:
    """The paper's two figures and ours: mean@1 before and after SFT that follows RL, on dev, means over seeds.

    The last column is the constant answer `acceptable` on CoLA's public in-domain dev file, 365 of 527 of whose
    sentences are acceptable.
    """
    rows = {"mean@1 after RL": {"paper, Qwen3-0.6B": 0.385}, "mean@1 after SFT": {"paper, Qwen3-0.6B": 0.343}}
    for name, store, preset in (("embedded model", ".", "tiny"), ("SmolLM2 on CoLA", "smollm2", "smollm2")):
        seeds = second_stage(results / store, "rl_then_sft", preset).groupby("seed")["mean_reward_dev"]
        rows["mean@1 after RL"][name], rows["mean@1 after SFT"][name] = seeds.first().mean(), seeds.last().mean()
    table = pd.DataFrame.from_dict(rows, orient="index").assign(**{"constant answer, CoLA dev": 2 * 365 / 527 - 1})
    table.loc["change"] = table.loc["mean@1 after SFT"] - table.loc["mean@1 after RL"]
    table.loc["accuracy after RL"] = (1 + table.loc["mean@1 after RL"]) / 2
    table.loc["accuracy after SFT"] = (1 + table.loc["mean@1 after SFT"]) / 2
    return table


def _first_record(store: Path, pipeline: str, preset: str, beta: float, **where: Any) -> records.RunRecord:
    return read_record(store / second_stage(store, pipeline, preset, beta, **where)["stage"].iloc[0])


def _report_ends(store, pipeline, preset, beta, **where) -> dict[str, pd.DataFrame]:
    """Metrics of the report before and after the last stage of `pipeline`: rows are seeds."""
    table = records.reports(store, pipeline, preset, beta, **where)
    last = table["point"].max()
    wide = table.pivot(index=["point", "seed"], columns="metric", values="value")
    return {"before": wide.loc[last - 1], "after": wide.loc[last]}
