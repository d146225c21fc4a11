"""Recorded runs beside the theory: what the theory made, the analysis finds again."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import publish_stage
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils import analysis, analysis_figures, measures, records, stages, tabular
from sftrl_utils.config import InputError

N = 60
ETAS = {10: 0.3, 40: 1.5, 160: 6.0}  # RL lengths, and the exact duration that each stands for


def table_of(log_p, q, label, point="end"):
    columns = {"unacceptable": log_p[:, 0], "acceptable": log_p[:, 1]}
    frame = pd.DataFrame({"point": point, "split": "dev", "label": label, "q": q, "phenomenon": "islands", **columns})
    return pd.concat([frame, frame.assign(split="train")], ignore_index=True)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Three seeds in which RL is exact: Gibbs policies of an imperfect SFT model, of several durations."""
    store = tmp_path_factory.mktemp("exact")
    rng = np.random.default_rng(0)
    q = rng.beta(0.6, 0.4, N).clip(0.03, 0.97)
    log_q = np.log(np.stack([1 - q, q], axis=1))
    for seed in range(3):
        label = (rng.random(N) < q).astype(int)
        odds = 0.6 * (log_q[:, 1] - log_q[:, 0]) + rng.normal(0, 0.3, N)  # too little confidence: RL can help at first
        log_s = -np.logaddexp(0, np.stack([odds, -odds], axis=1))
        report = {(point, name): 0.5 for point in ("start", "end") for name in ("answer_loss", "answer_loss_tempered")}
        report |= {(point, name): 0.5 for point in ("start", "end") for name in ("mcc", "acceptable_rate")}
        both = pd.concat([table_of(log_s, q, label, "start"), table_of(log_s, q, label)])
        first = publish_stage(
            store,
            seed,
            ("sft",),
            {"sft_loss_dev": [0.5, 0.4], "mean_reward_dev": [0.1, 0.2]},
            answers=both,
            report=report,
        )
        for steps, eta in ETAS.items():
            log_p = tabular.gibbs(log_s, tabular.label_reward(log_q), eta)
            later = {("end", "answer_loss"): 0.9, ("end", "answer_loss_tempered"): 0.6}
            later |= {("end", "mcc"): 0.4, ("end", "acceptable_rate"): 0.7}
            curve = {
                "step": [0, steps],
                "sft_loss_dev": [0.4, 0.4 + eta / 10],
                "mean_reward_dev": [0.2, 0.2 + eta / 10],
            }
            settings = {"parent": first, "answers": table_of(log_p, q, label), "report": later, "rl_steps": steps}
            publish_stage(store, seed, ("sft", "grpo"), curve, **settings)
    return store


@given(st.integers(0, 1000), st.floats(0.01, 5))
def test_the_duration_of_a_gibbs_policy_is_found_again(seed, eta):
    rng = np.random.default_rng(seed)
    log_s, log_q = (np.log(rng.dirichlet(np.ones(2), 8)) for _ in range(2))
    reward = tabular.label_reward(log_q)
    found, share = analysis.fitted_duration(log_s, tabular.gibbs(log_s, reward, eta), reward)
    assert found == pytest.approx(eta, rel=1e-6) and share == pytest.approx(1)


@given(st.integers(0, 1000), st.floats(0.05, 3), st.integers(2, 16))
def test_the_fixed_point_is_where_the_expected_update_vanishes(seed, beta, group_size):
    rng = np.random.default_rng(seed)
    log_s, log_q = (np.log(rng.dirichlet(np.ones(2), 8)) for _ in range(2))
    log_p = analysis.noisy_fixed_point(log_s, log_q, beta, group_size)
    assert np.logaddexp(*log_p.T) == pytest.approx(0, abs=1e-12)
    a, odds = np.exp(log_p[:, 1]), (log_p - log_s)[:, 1] - (log_p - log_s)[:, 0]
    update = a * (1 - a) * (2 * np.exp(log_q[:, 1]) - 1) * tabular.group_weight(a, group_size)
    assert update == pytest.approx(beta * a * (1 - a) * odds, abs=1e-9)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_with_certain_labels_it_is_the_fixed_point_of_the_theory(beta):
    log_s = np.log(np.random.default_rng(0).dirichlet(np.ones(2), 6))
    success = np.tile([0.0, 1.0], (6, 1))
    with np.errstate(divide="ignore"):
        ours = analysis.noisy_fixed_point(log_s, np.log(success), beta, 8)
    assert ours == pytest.approx(tabular.grpo_fixed_point(log_s, success, beta, 8), abs=1e-9)


def test_answers_are_paired_by_sentence(exact):
    rows = analysis.answers(exact, "sft_then_rl", rl_steps=40)
    assert len(rows) == 3 * 2 * N and set(rows["seed"]) == {0, 1, 2}
    log_q, log_s, log_p, _ = analysis.log_policies(rows.query("split == 'dev' and seed == 1"))
    assert log_p == pytest.approx(tabular.gibbs(log_s, tabular.label_reward(log_q), 1.5), abs=1e-6)


def test_where_rl_is_exact_the_threshold_gives_every_sign(exact):
    signs = analysis.threshold_signs(exact)
    assert len(signs) == 9 and set(signs["measured"]) == {-1, 1}
    assert (signs["predicted"] == signs["measured"]).all()
    assert signs["eta"].to_numpy() == pytest.approx(signs["rl_steps"].map(ETAS).to_numpy(), rel=1e-4)


def test_predictions_meet_what_is_exact(exact, tmp_path):
    store = tmp_path / "one"
    store.mkdir()
    for path in exact.iterdir():
        if path.name.startswith("sft") or path.name.endswith("-40"):
            (store / path.name).symlink_to(path)
    table = analysis.loss_predictions(store, [0.0])
    assert table["fitted"].to_numpy() == pytest.approx(table["measured"].to_numpy(), abs=1e-5)
    assert table["gibbs_share"].min() > 1 - 1e-6 and "fixed_point" not in table


def test_the_stop_is_the_first_step_at_the_data_s_reward(exact):
    stops = analysis.stopping_steps(exact)
    assert (stops["measured"] == 0).all()  # the curves that were published only rise
    for seed, row in stops.iterrows():
        sentences = analysis.answers(exact, "sft_then_rl", rl_steps=10).query(f"split == 'dev' and seed == {seed}")
        goal = (2 * np.where(sentences["label"] == 1, sentences["q"], 1 - sentences["q"]) - 1).mean()
        rewards = {0: 0.2} | {steps: 0.2 + eta / 10 for steps, eta in ETAS.items()}
        assert row["predicted"] == next((steps for steps, reward in rewards.items() if reward >= goal), np.inf)


def test_the_parts_of_an_effect_add_up(exact):
    loss = analysis.parts_of_the_loss(exact, "sft_then_rl", rl_steps=40)
    assert loss["total"].to_list() == pytest.approx([0.4] * 3) and loss["judgement"].to_list() == pytest.approx(
        [0.1] * 3
    )
    reward = analysis.parts_of_the_reward(exact, "sft_then_rl", rl_steps=160)
    assert (reward["answers"] + reward["confidence"]).to_numpy() == pytest.approx(reward["total"].to_numpy())
    assert reward["confidence"].abs().max() > 0.01 and reward["acceptable_rate"].to_list() == pytest.approx([0.2] * 3)


def test_no_policy_lies_below_the_frontier(exact):
    methods = {f"{steps} steps": {"store": ".", "pipeline": "sft_then_rl", "rl_steps": steps} for steps in ETAS}
    ends = analysis.plane(exact, methods)
    assert len(ends) == 9 and ends["excess"].dropna().min() > 0
    line = analysis.frontier_line(exact)
    assert line["reward"].is_monotonic_increasing and line["loss"].is_monotonic_increasing
    for row in ends.itertuples():
        assert row.loss > np.interp(row.reward, line["reward"], line["loss"]) - 1e-6


def test_by_phenomenon_it_is_the_mean_over_its_sentences(exact):
    rows = analysis.answers(exact, "sft_then_rl", rl_steps=40).query("split == 'dev' and seed == 0")
    right = np.where(rows["label"] == 1, rows["after_acceptable"], rows["after_unacceptable"])
    before = np.where(rows["label"] == 1, rows["before_acceptable"], rows["before_unacceptable"])
    found = analysis.by_phenomenon(exact, "sft_then_rl", rl_steps=40).set_index(["split", "phenomenon", "seed"])
    row = found.loc[("dev", "islands", 0)]
    assert row["sentences"] == N and row["loss"] == pytest.approx((before - right).mean())
    assert row["reward"] == pytest.approx((2 * np.exp(right) - 2 * np.exp(before)).mean())


def asked(store, measure, **runs):
    settings = {"rl_steps": 40}
    runs = measures.Runs(pipeline="sft_then_rl", seeds=3, settings=settings, **runs)
    question = measures.Question(store, runs, "all" if measure == "gradient cosine" else None)
    return measures.MEASURES[measure].function(question)


@pytest.mark.parametrize("measure", ["confidence beyond judgement", "answers beyond confidence", "gradient cosine"])
def test_a_measure_gives_what_was_published(exact, measure, tmp_path):
    store = shutil.copytree(exact, tmp_path / "store")
    rows = [
        {"labels": kind, "layer": layer, "stage": f"grpo-sft-grpo-{seed}-0.0-40", "cosine": seed / 10 + other}
        for kind, layer, other in [("population", "all", 0), ("population", "head", 1), ("sample", "all", 2)]
        for seed in range(3)
    ]
    (store / "gradients").mkdir()
    pd.DataFrame(rows).to_parquet(store / "gradients" / "cosines.parquet")
    records.write_checksums(store / "gradients")
    reward = analysis.parts_of_the_reward(store, "sft_then_rl", rl_steps=40)
    expected = {
        "confidence beyond judgement": [0.3 - 0.1] * 3,
        "answers beyond confidence": (reward["answers"] - reward["confidence"]).to_list(),
        "gradient cosine": [0.0, 0.1, 0.2],
    }
    found = asked(store, measure)
    assert found.to_list() == pytest.approx(expected[measure]) and list(found.index) == [0, 1, 2]


def test_measures_against_the_theory_on_what_is_exact(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "RL_LENGTHS", tuple(ETAS))
    assert (asked(exact, "threshold agreement") == 1).all()
    stops = analysis.stopping_steps(exact)
    assert asked(exact, "stopping octaves").to_list() == pytest.approx(
        (-np.log2(stops["predicted"].clip(1, 160))).to_list()
    )
    one = tmp_path / "one"
    one.mkdir()
    for path in exact.iterdir():
        if path.name.startswith("sft") or path.name.endswith("-40"):
            (one / path.name).symlink_to(path)
    assert asked(one, "Gibbs share").to_list() == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_policy_at_the_fixed_point_misses_it_by_less_than_nothing(exact, tmp_path, beta):
    for seed in range(3):
        before = records.read_answers(exact / f"sft-sft-{seed}-0.0").query("point == 'end' and split == 'dev'")
        log_q = np.log(np.stack([1 - before["q"], before["q"]], axis=1))
        log_s = before[["unacceptable", "acceptable"]].to_numpy()
        log_p = analysis.noisy_fixed_point(log_s, log_q, beta, 8)
        shutil.copytree(exact / f"sft-sft-{seed}-0.0", tmp_path / f"sft-sft-{seed}-0.0")
        after = table_of(log_p, before["q"].to_numpy(), before["label"].to_numpy())
        curve = {"step": [0, 40], "sft_loss_dev": [0.4, 0.4]}
        publish_stage(
            tmp_path, seed, ("sft", "grpo"), curve, parent=f"sft-sft-{seed}-0.0", beta=beta, answers=after, rl_steps=40
        )
    missed = asked(tmp_path, "fixed-point miss", beta=beta)
    change = analysis.loss_predictions(tmp_path, [beta]).set_index("seed")
    assert missed.to_list() == pytest.approx(
        (-(change["fixed_point"] - change["before"]).abs() / 5).to_list(), abs=1e-5
    )


@pytest.mark.parametrize("folder", ["sft-sft-1-0.0", "grpo-sft-grpo-1-0.0-40"])
@pytest.mark.parametrize(
    "name", ["answers.parquet", "report.parquet", "metrics.parquet", "record.json", "SHA256SUMS", ""]
)
@pytest.mark.parametrize("measure", ["Gibbs share", "answers beyond confidence", "fixed-point miss"])
def test_no_measure_reads_past_a_file_that_is_gone(exact, tmp_path, folder, name, measure):
    for path in exact.iterdir():
        if path.name.startswith("sft") or path.name.endswith("-40"):
            shutil.copytree(path, tmp_path / path.name)
    path = tmp_path / folder / name
    path.unlink() if name else shutil.rmtree(path)
    with pytest.raises(
        (LookupError, InputError), match=folder if folder[0] == "s" or name not in ("record.json", "") else "seed 1"
    ):
        asked(tmp_path, measure)


def test_trained_stages_feed_the_analysis_and_its_figures(small_config, tmp_path):
    few = small_config.model_copy(update={"sft_steps": 4, "rl_steps": 4, "evaluations": 1, "out_dir": tmp_path})
    for seed in range(2):
        stages.train_pipeline(few.model_copy(update={"seed": seed}), "sft_then_rl")
    loss = analysis.parts_of_the_loss(tmp_path, "sft_then_rl", "smoke")
    figure = analysis_figures.effect_parts({"loss": loss}, ["confidence", "judgement"])
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([loss["confidence"].mean(), loss["judgement"].mean()])
    table = analysis.by_phenomenon(tmp_path, "sft_then_rl", "smoke")
    assert {"train", "dev", "heldout"} == set(table["split"])
    figure = analysis_figures.phenomena(table, "loss", "change of the loss")
    assert len(figure.axes[0].get_yticklabels()) == table["phenomenon"].nunique()
