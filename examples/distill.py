# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""Make a model sparse, spread the sparsity over its layers, train its anchors: any Hub model, any TRL data set.

    python examples/distill.py --config examples/configs/tiny_llama.yaml
    python examples/distill.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name Salesforce/wikitext \
        --dataset_config wikitext-103-raw-v1 --sparsity 0.5 --max_steps 500 --output_dir smollm-spon
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distill.py --config my.yaml

Flags override the file. All fields of `SponTrainingConfig` (and so of TRL's `SFTConfig`), of TRL's `ScriptArguments`
and `ModelConfig`, and the ones below are flags. With `--dataset_streaming` nothing is downloaded beforehand; give
`--max_steps`. Resume with `--resume_from_checkpoint FOLDER`.
"""

import time
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from peft import PeftModel
from stdlib_data import stdlib_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, allocate


@dataclass
class SponArguments:
    """What the adapter is like; see [`SponConfig`]."""

    sparsity: float = field(default=0.5, metadata={"help": "Share of every layer's input that S zeroes."})
    criterion: str = field(
        default="magnitude", metadata={"help": "magnitude, relative, topk, wina, weighted, robust, rsparse or larosa."}
    )
    anchor_space: str = field(default="output", metadata={"help": "Anchors behind W (output) or before it (input)."})
    gain: bool = field(default=True, metadata={"help": "Also train one scale per input channel."})
    anchor_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that carry an anchor. Default: all."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of layers to leave dense."})
    allocation: str = field(
        default="kl",
        metadata={
            "help": "How the sparsity is spread over the layers of a new adapter before training: kl, greedy (TEAL's) "
            "or uniform."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "A trained SPON adapter to go on from; the fields above are then its own."}
    )


def load_data(args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """The data set of the arguments; `python-stdlib`: the source of Python's standard library, split by file."""
    if args.dataset_name == "python-stdlib":
        splits = {"train": "train", "test": "held_out"}
        texts = {name: list(stdlib_texts(split).values()) for name, split in splits.items()}
        return DatasetDict({name: Dataset.from_dict({"text": rows}).shuffle(seed=0) for name, rows in texts.items()})
    return load_dataset(args.dataset_name, name=args.dataset_config, streaming=args.dataset_streaming)


def main(script: ScriptArguments, training: SponTrainingConfig, model_args: ModelConfig, spon: SponArguments) -> None:
    begun = time.time()
    quantization = get_quantization_config(model_args)
    # Without a dtype of your own: the checkpoint's.
    dtype = model_args.dtype or "auto"
    base = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=dtype,
        quantization_config=quantization,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if spon.adapter:
        model, config = PeftModel.from_pretrained(base, spon.adapter, is_trainable=True), None
    else:
        model = base
        config = SponConfig(
            task_type="CAUSAL_LM",
            sparsity=spon.sparsity,
            criterion=spon.criterion,
            anchor_space=spon.anchor_space,
            gain=spon.gain,
            anchor_modules=spon.anchor_modules,
            exclude_modules=spon.exclude_modules,
        )
    data = load_data(script)
    held_out = data[script.dataset_test_split] if script.dataset_test_split in data else None
    trainer = SponTrainer(
        model=model,
        args=training,
        peft_config=config,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=held_out if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )
    if not spon.adapter:
        allocation = allocate(
            trainer.model,
            data[script.dataset_train_split],
            tokenizer,
            method=spon.allocation,
            max_length=training.max_length or 1024,
            calibration_tokens=training.calibration_tokens,
            text_column=training.dataset_text_field,
        )
        if trainer.is_world_process_zero():
            print(allocation)
    output = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        metrics = output.metrics
        if "kl_before" in metrics:  # not without a label to predict
            before, after = metrics["kl_before"], metrics["kl_after"]
            print(f"\nKL to the dense model: {before:.4f} before, {after:.4f} after training.")
        print(f"The adapter is in {training.output_dir}.")
        print(f"{time.time() - begun:.0f} s in all, {metrics['train_runtime']:.0f} s of them training.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SponTrainingConfig, ModelConfig, SponArguments))
    main(*parser.parse_args_and_config())
