"""One measurement in a process of its own: `python worker.py CASE VARIANT`, a JSON object on the last line.

VARIANT is `ours`, `tuned` (TRL at the best settings found: on a CPU float32 without checkpointing, on a GPU bf16
autocast without checkpointing, one batch a step) or `default` (TRL's own settings but for batch and steps).
"""

from __future__ import annotations

import json
import re
import resource
import statistics
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback, set_seed

from sftrl_utils import corpora, evaluation, models, training
from sftrl_utils.config import RunConfig
from sftrl_utils.prefix_sharing import PrefixSharingGRPOTrainer, PrefixSharingSFTTrainer

PROMPTS_PER_STEP = 4
ANSWER = 2  # tokens of an answer: the word and EOS


def load(name: str, dtype: torch.dtype = torch.float32):
    """Model of this shape and the tokenizer of the embedded one, whose tokens are within every vocabulary."""
    model, tokenizer = models.load("embedded")
    torch.manual_seed(0)
    if name == "smollm2":  # SmolLM2-135M's published configuration, random weights
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        shape |= dict(num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100_000.0)
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    elif name == "qwen3":  # Qwen3-0.6B's published configuration, random weights
        shape = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
        shape |= dict(num_key_value_heads=8, head_dim=128, vocab_size=151_936, max_position_embeddings=40_960)
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(dtype), tokenizer


class Clock(TrainerCallback):
    """Seconds of each step, sampling to optimiser."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        synchronise()
        self._start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronise()
        self.steps.append(time.perf_counter() - self._start)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def default_settings(kind, settings):
    """TRL's defaults, but for what both sides must have in common."""
    common = ("output_dir", "seed", "max_steps", "per_device_train_batch_size", "report_to", "disable_tqdm")
    common += ("save_strategy", "logging_steps", "learning_rate", "gradient_accumulation_steps", "max_length")
    common += ("num_generations", "max_completion_length", "steps_per_generation", "scale_rewards", "loss_type")
    kept = {name: getattr(settings, name) for name in common if hasattr(settings, name)}
    return kind(**kept, use_cpu=not torch.cuda.is_available())  # bf16, TRL's default, asks for it there


def train(trainer, steps: int) -> list[float]:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    assert len(clock.steps) == steps
    return clock.steps[1:]  # the first one warms up


def prompts_of(tokenizer, length: int, count: int) -> list[str]:
    """Distinct prompts of exactly `length` tokens, without a common beginning."""
    words = [word for word in (tokenizer.decode([i]) for i in range(len(tokenizer)))
             if re.fullmatch(r" [a-z]{2,}", word) and len(tokenizer(word * 2)["input_ids"]) == 2]  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (count, length), generator=rng).tolist()
    prompts = ["".join(words[i] for i in row) for row in drawn]
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {length}
    return prompts


def grpo(variant: str, name: str, length: int, group_size: int, steps: int) -> dict:
    model, tokenizer = load(name)
    config = RunConfig.from_parameters(
        {"rl_steps": steps, "batch_size": PROMPTS_PER_STEP * group_size, "group_size": group_size}
    )
    with tempfile.TemporaryDirectory() as scratch:
        settings = training.grpo_config(config, 0, scratch, ANSWER)
        if variant == "default":
            settings = default_settings(trl.GRPOConfig, settings)
        set_seed(0)

        def reward(completions, **_):
            return [float(len(text) % 2) for text in completions]

        data = datasets.Dataset.from_dict({"prompt": prompts_of(tokenizer, length, 4 * PROMPTS_PER_STEP)})
        trainer = PrefixSharingGRPOTrainer(
            model, reward, settings, train_dataset=data, processing_class=tokenizer, shared_prefix=variant == "ours"
        )
        seconds = train(trainer, steps)
    rows = PROMPTS_PER_STEP * group_size
    # Forward passes count 1, backward passes 2. Sampling, then scoring with its gradient.
    plain = rows * (length + ANSWER - 1) + 3 * rows * (length + ANSWER)
    needed = 4 * (PROMPTS_PER_STEP * length + rows * (ANSWER - 1))
    return {"seconds": statistics.median(seconds), "floor": plain / needed, "tokens": rows * (length + ANSWER)}


def sft(variant: str, name: str, batch_size: int, steps: int) -> dict:
    model, tokenizer = load(name)
    config = RunConfig.from_parameters({"sft_steps": steps, "batch_size": batch_size})
    corpus = corpora.load_corpus(config)
    with tempfile.TemporaryDirectory() as scratch:
        settings = training.sft_config(config, 0, scratch)
        if variant == "default":
            settings = default_settings(trl.SFTConfig, settings)
        elif variant == "tuned":
            settings.train_sampling_strategy = "group_by_length"
        set_seed(0)
        data = corpora.sft_dataset(tokenizer, corpus.splits["train"], "label")
        trainer = PrefixSharingSFTTrainer(
            model, settings, train_dataset=data, processing_class=tokenizer, shared_prefix=variant == "ours"
        )
        seconds = train(trainer, steps)
    lengths = [
        len(ids)
        for ids in tokenizer([p + c for p, c in zip(data["prompt"], data["completion"], strict=True)])["input_ids"]
    ]
    ids = [torch.tensor(row) for row in tokenizer(data["prompt"])["input_ids"]]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    from sftrl_utils.prefix_sharing import common_prefix

    shared, mean = common_prefix(padded, padded >= 0), statistics.mean(lengths)
    floor = batch_size * mean / (shared + batch_size * (mean - shared))
    return {"seconds": statistics.median(seconds), "floor": floor, "tokens": batch_size * mean}


def evaluate(variant: str, name: str, sentences: int) -> dict:
    """Answers to a split: closed-set scores, or one greedy answer each by `generate`."""
    model, tokenizer = load(name)
    model.eval()
    frame = corpora.load_corpus(RunConfig.from_parameters({"train_sentences": sentences})).splits["train"]
    evaluator_prompts = corpora.prompt_texts(tokenizer, list(frame["sentence"]), "label")
    answers = corpora.answer_texts(tokenizer, "label")
    synchronise()
    start = time.perf_counter()
    if variant == "ours":
        evaluation.score_responses(model, tokenizer, evaluator_prompts, [answers] * len(frame))
    else:
        for at in range(0, len(frame), evaluation.PROMPTS_PER_BATCH):
            part = evaluator_prompts[at : at + evaluation.PROMPTS_PER_BATCH]
            inputs = tokenizer(part, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            with torch.no_grad():
                model.generate(**inputs, do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER,
                               pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    synchronise()
    seconds = time.perf_counter() - start
    tokens = sum(len(ids) for ids in tokenizer(evaluator_prompts)["input_ids"])
    return {"seconds": seconds, "floor": None, "tokens": tokens}


def matrix_rate(seconds: float = 2.0) -> float:
    """Measured FLOP/s of square matrix products: float32 on a CPU, bfloat16 on a GPU."""
    cuda = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if cuda else (2048, torch.float32, "cpu")
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronise()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            a @ a
        synchronise()
        count += 5
    return 2 * size**3 * count / (time.perf_counter() - start)


def main() -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    case, variant = json.loads(sys.argv[1]), sys.argv[2]
    kind = {"grpo": grpo, "sft": sft, "eval": evaluate}[case.pop("kind")]
    parameters = sum(p.numel() for p in load(case["name"])[0].parameters())
    before = peak_mb()
    result = kind(variant, **case)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({**result, "peak_mb": peak_mb(), "loaded_mb": before, "device": device, "parameters": parameters}))


if __name__ == "__main__":
    main()
