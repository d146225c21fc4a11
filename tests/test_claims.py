"""The ledger: verdicts follow from files, and say when they do not; intervals cover what they should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import publish_stage
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils import analysis, claims, cli, measures, records, statements
from sftrl_utils.config import InputError

ROOT = Path(__file__).parent.parent
RUNS = {"pipeline": "sft_then_rl", "seeds": 4}
ENTRY = {
    "id": "loss-rises",
    "claim": "RL raises the loss.",
    "source": "ours",
    "statements": ["rl-threshold"],
    "experiment": "04_sft_then_rl",
    "statistic": "change",
    "metric": "sft_loss_dev",
    "direction": "above",
    "runs": RUNS,
}


@pytest.fixture
def results(tmp_path):
    """Four seeds in which RL raises the loss from about 0.2 to about 0.3, and SFT instead of it changes nothing."""
    rng = np.random.default_rng(0)
    for seed in range(4):
        start = 0.2 + 0.01 * rng.normal()
        first = publish_stage(tmp_path, seed, ("sft",), {"sft_loss_dev": [0.5, start]})
        rise = 0.1 + 0.01 * rng.normal()
        publish_stage(tmp_path, seed, ("sft", "grpo"), {"sft_loss_dev": [start, start + rise]}, first)
        publish_stage(tmp_path, seed, ("sft", "sft"), {"sft_loss_dev": [start, start + 0.001 * rng.normal()]}, first)
    return tmp_path


def claim(**changes):
    entry = {**ENTRY, **changes}
    return claims.Claim.model_validate({name: value for name, value in entry.items() if value is not None})


def planted(monkeypatch, function):
    """Let the statistic `change` be what `function` returns, of runs that need not exist."""
    monkeypatch.setitem(claims.MEASURES, "change", measures.Measure(function, metric=True))
    monkeypatch.setattr(claims, "versions_of", lambda *_: {("code", "corpus")})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "supported"),
        ({"direction": "below"}, "refuted"),
        ({"margin": 0.2}, "refuted"),
        ({"margin": 0.1}, "inconclusive"),
        ({"direction": "within", "margin": 0.2}, "supported"),
        ({"direction": "within", "margin": 0.01}, "refuted"),
        ({"runs": {**RUNS, "pipeline": "sft_then_sft"}}, "inconclusive"),
        ({"statistic": "above base"}, "refuted"),
        ({"statistic": "end"}, "supported"),
        ({"statistic": "change beyond", "against": {**RUNS, "pipeline": "sft_then_sft"}}, "supported"),
        ({"statistic": "end beyond", "against": {**RUNS, "pipeline": "sft_then_sft"}}, "supported"),
        ({"runs": {**RUNS, "seeds": 5}}, "missing"),
        ({"runs": {**RUNS, "pipeline": "rl_then_sft"}}, "missing"),
        ({"runs": {**RUNS, "store": "elsewhere"}}, "missing"),
        ({"metric": "reward"}, "missing"),
    ],
)
def test_a_verdict_follows_from_the_runs(results, changes, verdict):
    found = claims.judge(claim(**changes), results)
    assert found.verdict == verdict and found.id == "loss-rises"
    assert (found.seeds == 0) == (verdict == "missing") == bool(found.reason)


def test_the_effect_is_the_mean_over_seeds(results):
    found = claims.judge(claim(), results)
    table = records.second_stage(results, "sft_then_rl").groupby("seed")["sft_loss_dev"]
    assert found.effect == pytest.approx((table.last() - table.first()).mean()) and found.seeds == 4
    assert found.low < found.effect < found.high


def test_a_stage_before_the_last_that_is_deleted_is_noticed(results):
    shutil.rmtree(results / "sft-sft-2-0.0")
    assert claims.judge(claim(), results).reason.endswith("sft-sft-2-0.0 is missing, or not what was published")


def test_a_second_folder_that_says_it_is_the_stage_is_noticed(results):
    shutil.copytree(results / "grpo-sft-grpo-1-0.0", results / "grpo-other")
    assert claims.judge(claim(), results).reason == f"another folder of {results} says that it is grpo-sft-grpo-1-0.0"


@pytest.mark.parametrize("text", ["claims:", "claims: [", "other: []", "\xff"])
def test_a_file_that_is_no_ledger_is_one_line(tmp_path, text):
    path = tmp_path / "claims.yml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="is no ledger, a mapping with a list `claims`") as error:
        claims.read_ledger(path)
    assert "\n" not in str(error.value)


def test_runs_of_two_versions_of_the_code_are_not_compared(results):
    path = results / "sft-sft-sft-0-0.0" / "record.json"
    path.write_text(path.read_text().replace('"code":"x"', '"code":"y"'))
    records.write_checksums(path.parent)
    entry = claim(statistic="change beyond", against={**RUNS, "pipeline": "sft_then_sft"})
    assert "its runs are of 2 versions" in claims.judge(entry, results).reason


@pytest.mark.parametrize("name", ["record.json", "metrics.parquet", "SHA256SUMS"])
@pytest.mark.parametrize("kinds", ["grpo-sft-grpo", "sft-sft"])
def test_a_file_that_is_deleted_makes_its_claims_missing_and_no_others(results, name, kinds):
    other = claim(runs={**RUNS, "pipeline": "sft_then_sft"})
    (results / f"{kinds}-2-0.0" / name).unlink()
    found = claims.judge(claim(), results)
    assert found.verdict == "missing" and ("seed 2" in found.reason or f"{kinds}-2" in found.reason)
    assert (claims.judge(other, results).verdict == "missing") == (kinds == "sft-sft")


def test_a_file_that_is_altered_is_named(results):
    path = results / "grpo-sft-grpo-1-0.0" / "metrics.parquet"
    pd.read_parquet(path).assign(sft_loss_dev=[0.3, 0.1]).to_parquet(path)
    found = claims.judge(claim(), results)
    assert found.verdict == "missing" and found.reason.endswith(
        "grpo-sft-grpo-1-0.0/metrics.parquet is missing, or not what was published"
    )


def test_runs_that_say_otherwise_change_the_verdict(results):
    for seed in range(4):
        folder = results / f"grpo-sft-grpo-{seed}-0.0"
        table = pd.read_parquet(folder / "metrics.parquet")
        table.assign(sft_loss_dev=table["sft_loss_dev"].iloc[::-1].to_numpy()).to_parquet(folder / "metrics.parquet")
        records.write_checksums(folder)
    assert claims.judge(claim(), results).verdict == "refuted"


def test_a_statistic_that_is_not_a_number_is_missing_not_inconclusive(monkeypatch):
    planted(monkeypatch, lambda *_: pd.Series([0.1, np.nan, 0.2, 0.1]))
    found = claims.judge(claim(), Path())
    assert (found.verdict, found.reason) == ("missing", "change is not finite for every seed")


def test_seeds_beyond_those_of_the_claim_do_not_count(monkeypatch):
    planted(monkeypatch, lambda *_: pd.Series([0.1, 0.2, 0.1, 0.2, 99.0]))
    assert claims.judge(claim(), Path()).seeds == 4 and claims.judge(claim(), Path()).effect == pytest.approx(0.15)


def test_what_is_compared_over_lengths_needs_every_length(results):
    entry = claim(statistic="threshold agreement", metric=None)
    assert "no valid stage" in claims.judge(entry, results).reason


def test_the_analysis_knows_the_values_that_the_sweeps_have():
    grids = {
        name: yaml.safe_load((ROOT / "notebooks" / "sweeps" / f"{name}.yaml").read_text())["grid"]
        for name in ("beta", "duration")
    }
    assert grids == {"beta": {"beta": list(analysis.BETAS)}, "duration": {"rl_steps": list(analysis.RL_LENGTHS)}}


@given(st.floats(-2, 2), st.floats(0, 1), st.floats(0.01, 1), st.sampled_from(["above", "below", "within"]))
def test_what_an_interval_decides_every_point_of_it_decides(low, width, margin, direction):
    interval = claims.decide(low, low + width, direction, margin)
    parts = {claims.decide(point, point, direction, margin) for point in np.linspace(low, low + width, 50)}
    if interval != "inconclusive":
        assert parts == {interval}


def simulated(monkeypatch, effect, sd, seeds, count=1000):
    """Verdicts of `count` ledgers whose one statistic is normal over seeds."""
    rng = np.random.default_rng(1)
    planted(monkeypatch, lambda *_: pd.Series(rng.normal(effect, sd, seeds), index=range(seeds)))
    entry = claim(runs={**RUNS, "seeds": seeds})
    return [claims.judge(entry, Path()) for _ in range(count)]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_of_ledgers_without_an_effect_few_call_it_supported(monkeypatch, seeds):
    verdicts = [verdict.verdict for verdict in simulated(monkeypatch, 0.0, 1.0, seeds)]
    assert verdicts.count("supported") <= 70 and verdicts.count("refuted") <= 70


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_covers_a_known_effect(monkeypatch, seeds):
    covered = [verdict.low <= 0.3 <= verdict.high for verdict in simulated(monkeypatch, 0.3, 0.2, seeds)]
    assert sum(covered) >= 930


def test_a_ledger_of_the_control_s_skewed_data_still_covers(monkeypatch):
    rng = np.random.default_rng(2)
    planted(monkeypatch, lambda *_: pd.Series(rng.lognormal(0, 0.3, 10)))
    entry = claim(runs={**RUNS, "seeds": 10})
    verdicts = [claims.judge(entry, Path()) for _ in range(1000)]
    assert sum(verdict.low <= np.exp(0.045) <= verdict.high for verdict in verdicts) >= 930


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "up"}, "direction='up': input should be 'above', 'below' or 'within'"),
        ({"statistic": "mode"}, "statistic='mode' does not exist: choose one of change"),
        ({"statistic": "change beyond"}, "statistic='change beyond' needs against"),
        ({"against": RUNS}, "statistic='change' takes no against"),
        ({"statistic": "Gibbs share"}, "statistic='Gibbs share' takes no metric"),
        ({"statistic": "end beyond", "against": {**RUNS, "seeds": 3}}, "against has 3 seeds, runs 4"),
        ({"direction": "within"}, "direction='within' needs a margin above 0"),
        ({"id": "Loss Rises"}, "id='Loss Rises'"),
        (
            {"runs": {**RUNS, "pipeline": "sft_then_lr"}},
            "pipeline='sft_then_lr' does not exist: choose from constant_rl",
        ),
        ({"runs": {**RUNS, "preset": "tniy"}}, "preset='tniy' does not exist"),
        ({"runs": {**RUNS, "settings": {"sft_wieght": 1}}}, "settings='sft_wieght' does not exist"),
        (
            {"statistic": "Gibbs share", "metric": None, "runs": {**RUNS, "pipeline": "rl_then_sft"}},
            "statistic='Gibbs share' is of pipeline 'sft_then_rl' alone",
        ),
        ({"experiment": "04"}, "experiment='04'"),
        ({"note": "x"}, "note='x': extra inputs are not permitted"),
    ],
)
def test_an_entry_that_is_wrong_is_one_line(tmp_path, changes, message):
    path = tmp_path / "claims.yml"
    entry = {name: value for name, value in {**ENTRY, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(InputError) as error:
        claims.read_ledger(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_id_is_there_once(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"claims": [ENTRY, ENTRY]}))
    with pytest.raises(InputError, match="id 'loss-rises' is there twice"):
        claims.read_ledger(path)


@pytest.fixture
def checkout(results, tmp_path_factory):
    """A checkout with one claim and one page."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "book").mkdir()
    (root / "notebooks").mkdir()
    (root / "book" / "claims.yml").write_text(yaml.safe_dump({"figures": ["0.385"], "claims": [ENTRY]}))
    shutil.copytree(results, root / "data" / "results")
    return root


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("It does: [supported](ledger.md#claim-loss-rises), and falls from 0.385.", ""),
        (
            "It does: [refuted](#claim-loss-rises).",
            "book/page.md: says that loss-rises is refuted, the data say supported",
        ),
        (
            "[supported](#claim-loss)",
            "book/page.md: says that loss is supported, the data say that there is no such claim",
        ),
        ("The loss is 0.208 then.", "book/page.md: 0.208 is typed by hand, glue it from the run that gave it"),
        ("{glue:text}`a:.3f`, `0.208`, $0.208$, version 0.20.8 and\n```\n0.208\n```", ""),
    ],
)
def test_a_page_that_misquotes_the_data_fails(checkout, monkeypatch, capsys, text, complaint):
    (checkout / "book" / "page.md").write_text(text)
    monkeypatch.chdir(checkout)
    assert cli.main(["claims"]) == (1 if complaint else 0)
    out, err = capsys.readouterr()
    assert err == (f"sftrl: {complaint}\n" if complaint else "")
    assert out.startswith("supported") and "1 supported, 0 refuted, 0 inconclusive, 0 missing" in out


def test_the_ledger_as_json_and_as_a_page(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    assert cli.main(["claims", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert set(row) == {"id", "verdict", "effect", "low", "high", "seeds", "reason"} and row["verdict"] == "supported"
    ledger = claims.read_ledger(checkout / "book" / "claims.yml")
    results = checkout / "data" / "results"
    page = claims.page(ledger, [claims.judge(entry, results) for entry in ledger], results)
    assert "(claim-loss-rises)=\n## RL raises the loss." in page and "[RL raises the loss.](#claim-loss-rises)" in page
    assert "**Supported**: +0." in page and "seeds 0 to 3" in page
    assert "(../notebooks/04_sft_then_rl.ipynb)" in page and "{prf:ref}`rl-threshold`" in page
    assert "\nsftrl run sft_then_rl -p preset tiny\n" in page


def test_from_any_folder_it_judges_the_checkout_s_own_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["claims"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "rl-raises-sft-loss-train" in out


def test_the_book_s_own_ledger_has_the_paper_s_claims_in_each_setting_and_data_for_most():
    ledger = claims.read_ledger(ROOT / "book" / "claims.yml")
    assert len(ledger) >= 14
    checks = {statement.__name__.replace("_", "-") for statement in statements.STATEMENTS}
    assert {label for entry in ledger for label in entry.statements} <= checks
    assert all((ROOT / "notebooks" / f"{entry.experiment}.ipynb").is_file() for entry in ledger)
    for first, statistic in (("rl-raises-sft-loss", "sft_loss"), ("sft-lowers-reward", "mean_reward")):
        settings = {
            (entry.metric, entry.runs.beta > 0, entry.runs.preset)
            for entry in ledger
            if entry.id.startswith(first) and entry.statistic == "change"
        }
        splits = [f"{statistic}_train", f"{statistic}_heldout"]
        wanted = {(split, held, preset) for split in splits for held in (False, True) for preset in ("tiny", "smollm2")}
        assert wanted <= settings
    verdicts = [claims.judge(entry, ROOT / "data" / "results") for entry in ledger]
    missing = {verdict.id for verdict in verdicts if verdict.verdict == "missing"}
    assert missing == {"sft-lowers-reward-train-smollm2-anchored", "sft-lowers-reward-heldout-smollm2-anchored"}
    texts = claims.pages(ROOT)
    assert claims.misquoted(texts, verdicts) == []
    assert claims.typed_metrics(texts, claims.quotable_figures(ROOT / "book" / "claims.yml")) == []
