"""The prefix-sharing trainer against plain TRL: same numbers, same gradients, same samples in distribution."""

import dataclasses
import inspect
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from transformers import DynamicCache, MistralConfig, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTTrainer

from sftrl_utils import corpora, models, prefix_sharing, training
from sftrl_utils.prefix_sharing import PrefixSharingGRPOTrainer, PrefixSharingSFTTrainer
from sftrl_utils.rewards import verifier


@pytest.fixture(scope="module")
def make(small_config, tmp_path_factory):
    """A trainer of the shipped base model; settings of `GRPOConfig` and of the model's config may be changed."""
    corpus = corpora.load_corpus(small_config)

    def trainer(shared_prefix=True, steps=3, beta=0.0, **settings):
        model, tokenizer = models.load("embedded")
        folder = tmp_path_factory.mktemp("grpo")
        models.save(model, tokenizer, folder / "start")
        model.config._name_or_path = str(folder / "start")
        config = small_config.model_copy(update={"rl_steps": steps, "beta": beta})
        arguments = training.grpo_config(config, 0, str(folder), settings.pop("max_completion_length", 4))
        if settings.pop("bf16", False):
            arguments = dataclasses.replace(arguments, bf16=True, use_cpu=True, generation_batch_size=None)
        for name, value in settings.items():
            setattr(arguments, name, value)
        set_seed(0)
        frame = corpus.splits["train"]
        return PrefixSharingGRPOTrainer(
            model, verifier("label"), arguments, train_dataset=corpora.rl_dataset(tokenizer, frame, "label"),
            processing_class=tokenizer, shared_prefix=shared_prefix,
        )  # fmt: skip

    return trainer


def batch_of(prompts, completions):
    """Left-padded prompts and right-padded completions, as TRL makes them."""
    width, length = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(len(prompts), width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, width - len(prompt) : width + len(completion)] = torch.tensor([*prompt, *completion])
        mask[row, width - len(prompt) : width + len(completion)] = 1
    return ids, mask, length


SHORT, LONG = [11, 12, 13], [21, 22, 23, 24, 25, 26, 27]
BATCHES = {
    "ragged": ([SHORT, LONG, SHORT, LONG, LONG], [[31, 2], [32, 33, 34, 2], [35, 2], [36], [31, 32, 2]]),
    "one prompt": ([LONG] * 4, [[31, 2], [32, 2], [33, 34], [31, 2]]),
    "no shared prompt": ([SHORT, LONG], [[31, 2], [32, 33]]),
    "one completion": ([LONG], [[31, 32, 33]]),
    "one token": ([SHORT, SHORT, LONG], [[31], [32], [33]]),
    "a prompt that ends another": ([SHORT, [1, *SHORT], SHORT], [[31, 2], [31, 2], [32, 2]]),
}


def scored(trainer, shared, batch, **options):
    trainer.shared_prefix = shared
    return trainer._get_per_token_logps_and_entropies(trainer.model, *batch, compute_entropy=True, **options)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_probabilities_entropies_and_gradients_are_plain_trl_s(make, name, batch_size):
    trainer, batch = make(), batch_of(*BATCHES[name])
    ours, plain = (scored(trainer, shared, batch, batch_size=batch_size) for shared in (True, False))
    kept = batch[1][:, -batch[2] :].bool()
    torch.manual_seed(0)
    weights = torch.randn(kept.shape) * kept
    gradients = []
    for values in (ours, plain):
        assert values[2] is None
        loss = (values[0] * weights).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))]))
    for mine, theirs in zip(ours[:2], plain[:2], strict=True):
        assert mine.shape == theirs.shape and (mine - theirs)[kept].abs().max() < 1e-4
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


class Gradients(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self, kept):
        self.kept = kept

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_in_half_precision_weights_are_cast_once_a_step_and_every_pass_has_its_gradient(make, monkeypatch, beta):
    gradients, casts = [], []
    for context in (prefix_sharing.cast_once, lambda _: nullcontext()):
        monkeypatch.setattr(prefix_sharing, "cast_once", context)
        trainer = make(steps=1, beta=beta, bf16=True)
        assert trainer.accelerator.mixed_precision == "bf16"
        gradients.append([])
        trainer.add_callback(Gradients(gradients[-1]))
        with torch.profiler.profile() as profile:
            trainer.train()
        casts.append(next(event.count for event in profile.key_averages() if event.key == "aten::_to_copy"))
        AcceleratorState._reset_state(reset_partial_state=True)
    matrices = sum(isinstance(module, torch.nn.Linear) for module in trainer.model.modules())
    assert casts[1] - casts[0] > 1.5 * matrices  # two passes of three: prompts, samples, completions
    [[ours], [plain]] = gradients
    assert plain.norm() > 0 and (ours - plain).norm() < 0.02 * plain.norm()


def test_without_gradients_and_entropies_too(make):
    trainer, batch = make(), batch_of(*BATCHES["ragged"])
    trainer.shared_prefix = True
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *batch)
    assert entropies is None and not logps.requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_loss_and_its_gradient_on_one_batch_are_plain_trl_s(make, beta):
    trainer = make(beta=beta)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if beta:
        trainer.shared_prefix = False
        batch = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask")]
        with torch.no_grad():
            plain, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model, *batch, inputs["completion_ids"].size(1)
            )
        kept = inputs["completion_mask"].bool()
        assert (plain - inputs["ref_per_token_logps"])[kept].abs().max() < 1e-4
        inputs["ref_per_token_logps"] = plain + 0.3  # a reference elsewhere, or the KL term has no gradient
    results = []
    for shared in (True, False):
        trainer.shared_prefix = shared
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        results.append((loss.item(), gradient))
    (ours, mine), (plain, theirs) = results
    assert ours == pytest.approx(plain, abs=1e-5)
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def gradient_of(trainer, inputs):
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def encoded_prompts(trainer, monkeypatch):
    """Counts the forward passes over prompts from here on."""
    passes, forward = [], trainer.model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", counted)
    return passes


@pytest.mark.parametrize("name", ["train", "eval"])
def test_the_loss_takes_over_what_sampling_encoded_and_its_gradient_is_plain_trl_s(make, monkeypatch, name):
    trainer = make()
    getattr(trainer.model, name)()
    batch = next(iter(trainer.get_train_dataloader()))
    passes = encoded_prompts(trainer, monkeypatch)
    inputs = trainer._prepare_inputs(batch)
    assert (trainer._encoded is not None) == (name == "train")
    before = len(passes)
    ours = gradient_of(trainer, inputs)
    assert len(passes) - before == (1 if name == "train" else 2) and trainer._encoded is None
    trainer.shared_prefix = False
    plain = gradient_of(trainer, inputs)
    assert (ours - plain).norm() <= 1e-4 * plain.norm() > 0


@pytest.mark.parametrize("setting", ["num_iterations", "steps_per_generation"])
def test_samples_of_several_updates_are_encoded_for_each(make, setting):
    trainer = make()
    setattr(trainer.args if setting == "steps_per_generation" else trainer, setting, 2)
    trainer.model.train()
    trainer._generate_single_turn([SHORT, LONG], None, {}, 1)
    assert trainer._encoded is None


def test_what_sampling_encoded_is_for_its_own_prompts_and_model_only(make):
    trainer = make()
    trainer.model.train()
    batch = batch_of([SHORT, SHORT, LONG], [[31, 2], [32, 2], [33, 2]])
    expected = scored(trainer, False, batch)[0]
    trainer.shared_prefix = True
    trainer._generate_single_turn([SHORT, [41, 42, 43, 44, 45, 46, 47]], None, {}, 1)
    assert (scored(trainer, True, batch)[0] - expected).abs().max() < 1e-4
    trainer._generate_single_turn([SHORT, LONG], None, {}, 1)
    other = make().model
    torch.nn.init.normal_(other.lm_head.weight, std=0.05)
    mine = trainer._get_per_token_logps_and_entropies(other, *batch)[0]
    trainer.shared_prefix = False
    assert (mine - trainer._get_per_token_logps_and_entropies(other, *batch)[0]).abs().max() < 1e-4


def test_groups_of_one_are_sampled_and_scored(make):
    trainer = make()
    trainer.shared_prefix = True
    sampled, logprobs = trainer._generate_single_turn([SHORT, LONG], None, {}, 1)
    assert len(sampled) == 2 and logprobs is None


def test_samples_have_plain_trl_s_distribution(make):
    trainer = make(max_completion_length=3)
    texts = trainer.train_dataset["prompt"][:2]
    short, long = (trainer.processing_class(text)["input_ids"] for text in texts)
    assert len(short) != len(long)
    prompts = [short] * 1500 + [long] * 1500
    counts = []
    for shared in (True, False):
        trainer.shared_prefix = shared
        sampled, _ = trainer._generate_single_turn(prompts, None, {}, 1500)
        assert all(1 <= len(ids) <= 3 for ids in sampled)
        end = trainer.eos_token_ids
        assert all(token not in end for ids in sampled for token in ids[:-1])
        assert all(ids[-1] in end or len(ids) == 3 for ids in sampled)
        counts.append([tuple(ids) for ids in sampled])
    for half in (slice(0, 1500), slice(1500, None)):
        ours, plain = (samples[half] for samples in counts)
        common = [answer for answer in set(ours) | set(plain) if ours.count(answer) + plain.count(answer) >= 20]
        table = np.array([[samples.count(answer) for answer in common] for samples in (ours, plain)])
        table = np.c_[table, 1500 - table.sum(1)]
        assert len(common) >= 2
        assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("top_k", 3), ("top_p", 0.5)])
def test_sampling_settings_count(make, name, value):
    trainer = make(**{name: value, "max_completion_length": 1})
    assert trainer.shared_prefix
    prompt = trainer.processing_class(trainer.train_dataset["prompt"][0])["input_ids"]
    sampled, _ = trainer._generate_single_turn([prompt] * 2000, None, {}, 2000)
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (logits / value if name == "temperature" else logits).softmax(-1)
    ordered, places = expected.sort(descending=True)
    kept = {"temperature": len(logits), "top_k": 3, "top_p": int((ordered.cumsum(0) < 0.5).sum()) + 1}[name]
    expected[places[kept:]] = 0
    shares = torch.bincount(torch.tensor([ids[0] for ids in sampled]), minlength=len(logits)) / 2000
    assert (shares - expected / expected.sum()).abs().max() < 0.05
    assert shares[expected == 0].sum() == 0
    plain = torch.log_softmax(trainer.model(input_ids=torch.tensor([LONG])).logits[0, -1] / trainer.temperature, -1)
    ours, _, _ = scored(trainer, True, batch_of([LONG], [[31]]))
    assert ours[0, 0].item() == pytest.approx(plain[31].item(), abs=1e-4)  # as TRL: temperature, not top-k or top-p


def test_training_keeps_trl_s_logs_and_raises_the_reward(make):
    logs = []
    for shared in (True, False):
        trainer = make(shared, steps=30, learning_rate=1e-4)
        trainer.reward_funcs = [lambda completions, **_: [float(text == "unacceptable") for text in completions]]
        trainer.train()
        logs.append([set(entry) for entry in trainer.state.log_history])
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert len(rewards) == 30 and np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.1
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "beta": 0.1},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"temperature": 0.7, "beta": 0.1},
    ],
    ids=str,
)
def test_every_loss_of_a_training_is_plain_trl_s(make, monkeypatch, settings):
    """On the batches of our own run: what plain TRL's loss would have been at each step."""
    settings, losses = dict(settings), []
    trainer = make(steps=3, beta=settings.pop("beta", 0.0), **settings)
    original = trainer.compute_loss

    def both(model, inputs, **options):
        ours = original(model, inputs, **options)
        trainer.shared_prefix = False
        with torch.no_grad():
            losses.append((ours.item(), original(model, inputs, **options).item()))
        trainer.shared_prefix = True
        return ours

    monkeypatch.setattr(trainer, "compute_loss", both)
    trainer.train()
    ours, plain = zip(*losses, strict=True)
    assert len(losses) >= 3 and ours == pytest.approx(plain, abs=1e-5)


def test_what_sampling_keeps_does_not_outlive_an_error(make):
    trainer = make(steps=1)

    def fails(*_, **__):
        raise RuntimeError("no reward")

    trainer.reward_funcs = [fails]
    with pytest.raises(RuntimeError, match="no reward"):
        trainer.train()
    assert trainer._encoded is None


def test_a_resumed_run_ends_where_an_unbroken_one_does(make, tmp_path):
    whole = make(steps=4)
    whole.train()
    half = make(steps=2, save_strategy="steps", save_steps=2, output_dir=str(tmp_path))
    half.train()
    rest = make(steps=4, output_dir=str(tmp_path))
    rest.train(resume_from_checkpoint=True)
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: setattr(t.args, "activation_checkpointing", True), "activations are checkpointed"),
        (lambda t: setattr(t, "use_vllm", True), "vLLM"),
        (lambda t: setattr(t.model.config, "attention_dropout", 0.1), "dropout"),
        (lambda t: t.model.add_module("drop", torch.nn.Dropout(0.1)), "dropout"),
        (lambda t: setattr(t, "use_transformers_continuous_batching", True), "continuous batching"),
        (lambda t: setattr(t.model, "config", MistralConfig()), "sliding window"),
        (lambda t: setattr(t.model.config, "rope_parameters", None), "rotary"),
        (lambda t: setattr(t.model.generation_config, "no_repeat_ngram_size", 2), "no_repeat_ngram_size"),
        (lambda t: setattr(t.args, "cache_implementation", "static"), "cache_implementation"),
        (lambda t: setattr(t.args, "neftune_noise_alpha", 5.0), "neftune"),
        (lambda t: setattr(t.model, "peft_config", {"x": type("P", (), {"is_prompt_learning": True})}), "PEFT"),
        (lambda t: setattr(t, "_is_vlm", True), "images"),
        (lambda t: setattr(t, "tools", ["search"]), "tools"),
        (lambda t: setattr(t.args, "min_p", 0.1), "min_p"),
        (lambda t: setattr(t.args, "generation_kwargs", {"num_beams": 2}), "generation_kwargs"),
        (lambda t: setattr(t.args, "cast_lm_head_to_fp32", True), "head is cast"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sharing_says_why_it_would_not_be_exact(make, change, reason):
    trainer = make()
    assert trainer._obstacles() == []
    change(trainer)
    assert any(reason in obstacle for obstacle in trainer._obstacles())


def test_one_warning_and_plain_trl_where_it_would_not_be_exact(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(min_p=0.01, steps=1)
    said = [str(warning.message) for warning in caught if "plain TRL" in str(warning.message)]
    assert len(said) == 1 and "min_p" in said[0] and not trainer.shared_prefix
    trainer.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not make(shared_prefix=False).shared_prefix
    assert not [warning for warning in caught if "plain TRL" in str(warning.message)]


def test_the_hubs_usual_generation_settings_are_no_obstacle(make):
    trainer = make()
    trainer.model.generation_config.update(temperature=0.6, top_k=20, top_p=0.95, do_sample=True)
    assert trainer._obstacles() == []


PARAMETERS = {
    "_get_per_token_logps_and_entropies": [
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
        *("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_the_methods_we_replace_are_still_trl_s(method):
    """Fails by name when TRL moves: read its new method, then change `prefix_sharing` and this list."""
    trainer = SFTTrainer if method == "compute_loss" else GRPOTrainer
    theirs = list(inspect.signature(getattr(trainer, method)).parameters)
    gone, new = set(PARAMETERS[method]) - set(theirs), set(theirs) - set(PARAMETERS[method])
    assert theirs == PARAMETERS[method], f"{trainer.__name__}.{method}: gone {sorted(gone)}, new {sorted(new)}"


def test_what_else_we_lean_on_is_still_there():
    assert {"temperature", "top_p", "top_k", "min_p", "generation_kwargs", "cast_lm_head_to_fp32"} <= set(
        GRPOConfig.__dataclass_fields__
    )
    assert callable(DynamicCache.batch_select_indices) and callable(DynamicCache.batch_repeat_interleave)
    assert callable(prefix_sharing.pad)
    head = inspect.getsource(prefix_sharing.trl_utils.add_fused_lm_head)
    assert "compact = _use_triton(" in head and "shift_labels" in head, "TRL's fused head has changed"
    source = inspect.getsource(GRPOTrainer)
    for name in ("self._tokenizer", "self.eos_token_ids", "self.aux_loss_enabled", "self._is_vlm", "self.rollout_func"):
        assert name in source, f"GRPOTrainer has no {name} any more"


# ---- SFT


@pytest.fixture(scope="module")
def make_sft(small_config, tmp_path_factory):
    corpus = corpora.load_corpus(small_config)

    def trainer(shared_prefix=True, steps=3):
        model, tokenizer = models.load("embedded")
        config = small_config.model_copy(update={"sft_steps": steps})
        arguments = training.sft_config(config, 0, str(tmp_path_factory.mktemp("sft")))
        set_seed(0)
        data = corpora.sft_dataset(tokenizer, corpus.splits["train"], "label")
        return PrefixSharingSFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, shared_prefix=shared_prefix
        )

    return trainer


def sft_batch(prompts, completions):
    """Right-padded rows with labels on the completions, as TRL makes them."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    batch = {name: torch.full((len(prompts), width), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor([*prompt, *completion])
        batch["labels"][row, len(prompt) : end] = torch.tensor(completion)
        batch["attention_mask"][row, :end] = 1
    return batch


TEMPLATE = [5, 6, 7, 8, 9]
SFT_BATCHES = {
    "a template": ([TEMPLATE + SHORT, TEMPLATE + LONG, TEMPLATE + [14]], [[31, 2], [32, 33, 2], [31, 2]]),
    "the same prompt": ([TEMPLATE] * 3, [[31, 2], [32, 2], [31, 33, 2]]),
    "the same row": ([TEMPLATE] * 2, [[31, 2]] * 2),
    "nothing in common": ([SHORT, LONG], [[31, 2], [32, 2]]),
    "one row": ([TEMPLATE], [[31, 2]]),
    "a prompt of one token": ([[5], [5]], [[31, 2], [32]]),
}


@pytest.mark.parametrize("name", SFT_BATCHES)
@pytest.mark.parametrize("items", [None, 7])
def test_the_sft_loss_metrics_and_gradient_are_plain_trl_s(make_sft, name, items):
    trainer, results = make_sft(), []
    trainer.model.train()
    for shared in (True, False):
        trainer.shared_prefix = shared
        trainer._metrics["train"].clear()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, sft_batch(*SFT_BATCHES[name]), num_items_in_batch=items)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        results.append((loss.item(), gradient, {k: v[-1] for k, v in trainer._metrics["train"].items()}))
    (ours, mine, logged), (plain, theirs, expected) = results
    assert ours == pytest.approx(plain, abs=1e-5)
    assert (mine - theirs).norm() < 1e-4 * theirs.norm()
    tokens = {name: metrics.pop("num_tokens") for name, metrics in (("ours", logged), ("plain", expected))}
    assert logged == pytest.approx(expected, abs=1e-5)
    seen = sft_batch(*SFT_BATCHES[name])["attention_mask"].sum().item()
    assert tokens["plain"] - tokens["ours"] == pytest.approx(seen)  # counted once each


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_common_prefix_is_the_longest_that_leaves_a_token(rows):
    batch = sft_batch(rows, [[] for _ in rows])
    shared = prefix_sharing.common_prefix(batch["input_ids"], batch["attention_mask"])
    expected = max(n for n in range(min(map(len, rows))) if all(row[:n] == rows[0][:n] for row in rows))
    assert shared == expected


@pytest.mark.parametrize("name", ["label_smoother", "compute_loss_func"])
def test_a_loss_that_runs_the_model_twice_shares_nothing(make_sft, name):
    trainer = make_sft()
    assert trainer._obstacles() == []
    setattr(trainer, name, object())
    assert len(trainer._obstacles()) == 1


def test_sft_learns_the_same_from_the_same_seed(make_sft):
    ends = []
    for shared in (True, False):
        trainer = make_sft(shared, steps=5)
        trainer.train()
        ends.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.state.log_history))
    (ours, logs), (plain, theirs) = ends
    assert (ours - plain).norm() < 1e-3 * plain.norm()
    for mine, other in zip(logs, theirs, strict=True):
        assert set(mine) == set(other) and mine.get("loss") == pytest.approx(other.get("loss"), abs=1e-3)


def test_training_uses_both_by_default(sft_then_rl, monkeypatch, small_config, tmp_path):
    from sftrl_utils import stages

    made = []
    for trainer in (PrefixSharingSFTTrainer, PrefixSharingGRPOTrainer):
        original = trainer.train
        monkeypatch.setattr(trainer, "train", lambda self, original=original: (made.append(self), original(self))[1])
    stages.train_pipeline(
        small_config.model_copy(update={"out_dir": tmp_path, "sft_steps": 1, "rl_steps": 1}), "sft_then_rl"
    )
    assert [type(trainer) for trainer in made] == [PrefixSharingSFTTrainer, PrefixSharingGRPOTrainer]
    assert all(trainer.shared_prefix for trainer in made)
