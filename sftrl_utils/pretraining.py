"""The embedded base model: its tokenizer, its architecture and its pre-training on generated text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProgressCallback, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from sftrl_utils import grammar
from sftrl_utils.corpora import PROMPTS, prompt_texts, response_text
from sftrl_utils.models import save
from sftrl_utils.records import versions

# Qwen3's special tokens, in the order of its vocabulary.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>"),
    *("</tool_response>", "<think>", "</think>"),
]
VOCABULARY = 2048  # at most: every word of the grammar is one token, and bytes cover the rest
# The same split of text into words as Qwen3's tokenizer makes, so that prompts end on a token boundary.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIALOGUES = 72_000  # distinct sentences, each seen once, none of them in train, dev or heldout
RATIONALE_SHARE = 0.2  # enough that the format of both response styles is known
ATTENTION = 0.8  # share of judgements that heed the sentence: knows the language, hesitates more than q
BASE_RATE = 0.7  # what an inattentive judge answers "acceptable" with: the corpus's own share
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # usual for one million parameters from scratch, cosine decay, 5 % warm-up
SEED = 0


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, with Qwen3's special tokens and TRL's Qwen3 chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        padding_side="left",
        chat_template=template.read_text(encoding="utf-8"),
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Untrained Qwen3 of about a million parameters: 4 layers of width 128, tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def judged_sentences(count: int, seed: int = SEED) -> pd.DataFrame:
    """`count` sentences, each with a not always attentive judgement and the response style asked for.

    With probability `ATTENTION` the answer is the annotator's label, otherwise `acceptable` with
    probability `BASE_RATE`: P(acceptable | x) = 0.8 q(x) + 0.14.
    """
    rng = np.random.default_rng(seed)
    examples = grammar.examples("pretrain", count, seed)
    guess = rng.random(count) < BASE_RATE
    attentive = rng.random(count) < ATTENTION
    return pd.DataFrame(
        {
            "sentence": [e.sentence for e in examples],
            "phenomenon": [e.phenomenon for e in examples],
            "label": np.where(attentive, [e.label for e in examples], guess).astype(int),
            "style": np.where(rng.random(count) < RATIONALE_SHARE, "rationale", "label"),
        }
    )


def dialogues(tokenizer: PreTrainedTokenizerFast, judged: pd.DataFrame) -> list[str]:
    """One rendered question-and-answer text per row of `judged`."""
    prompts = {style: prompt_texts(tokenizer, list(judged["sentence"]), style) for style in ("label", "rationale")}
    rows = enumerate(judged.itertuples())
    return [
        prompts[row.style][i] + response_text(row.label, row.style, row.phenomenon) + tokenizer.eos_token
        for i, row in rows
    ]


def pretrain(folder: Path, sentences: int = DIALOGUES, max_steps: int = -1) -> list[float]:
    """Train the base model, write it to `folder` with a report beside it; returns each step's loss.

    The loss (nats per token) runs over every token: the model learns the sentences and the noisy
    judgements together. `max_steps` above 0 ends early; the first 100 steps warm up and stay the same.
    """
    judged = judged_sentences(sentences)
    reasons = [response_text(row.label, "rationale", row.phenomenon) for row in judged.itertuples()]
    fixed = [*PROMPTS.values(), "user assistant\n\n", "assistant"] * 100  # often enough to become whole tokens
    tokenizer = build_tokenizer([*judged["sentence"], *reasons, *fixed])
    texts = dialogues(tokenizer, judged)
    set_seed(SEED)
    model = build_model(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            max_length=None,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            use_cpu=True,
        )
        trainer = SFTTrainer(
            model, settings, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_QuietBar)
        trainer.train()
    save(model, tokenizer, folder)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    report = {"sentences": sentences, "steps": len(losses), "first_losses": losses[:20], "last_losses": losses[-20:]}
    (folder / "pretraining.json").write_text(json.dumps(report | {"versions": versions()}, indent=2) + "\n")
    return losses


class _QuietBar(ProgressCallback):
    """The progress bar without a line for every logged step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass
