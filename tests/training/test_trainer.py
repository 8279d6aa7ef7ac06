"""A merged model under transformers' own Trainer: the embedding learns, the backbone stays, a checkpoint resumes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from dtem_hf import AutoModelForImageClassification, DTEMConfig
from dtem_hf.training.parameters import choose_learned


@pytest.fixture
def examples(vit_folder):
    """Images with the labels that the unmerged model gives them, which merging can learn to go on giving."""
    pixels = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        labels = ViTForImageClassification.from_pretrained(vit_folder)(pixels).logits.argmax(-1)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


@pytest.fixture
def make_trainer(vit_folder, examples, tmp_path):
    def make(name, steps, checkpoint=None):
        if checkpoint is None:
            model = AutoModelForImageClassification.from_pretrained(
                vit_folder, merge=DTEMConfig(r=4, init="random"), hidden_dropout_prob=0.0
            )
        else:
            model = AutoModelForImageClassification.from_pretrained(checkpoint)
        choose_learned(model, train_backbone=False)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=5,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=examples)

    return make


def embedding(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "merge_embedding" in name}


def test_loss_falls_and_only_the_embedding_moves(make_trainer, vit_folder):
    torch.manual_seed(1)
    trainer = make_trainer("whole", 20)
    before = embedding(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    moved = [not torch.equal(after, before[name]) for name, after in embedding(trainer.model).items()]
    assert sum(moved) >= 6  # what the last layer merges reaches no logit
    plain = ViTForImageClassification.from_pretrained(vit_folder)
    for name, parameter in plain.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), parameter), name


def test_checkpoint_resumes_to_the_same_bits(make_trainer, tmp_path):
    """The model is loaded from it first: the Trainer of transformers 5.23 looks for a ViT's weights, merged or plain,
    under names that they do not have in a checkpoint, and restores all but those."""
    torch.manual_seed(1)
    whole = make_trainer("whole", 10)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    torch.manual_seed(2)
    resumed = make_trainer("resumed", 10, checkpoint)
    halfway, expected = embedding(resumed.model), embedding(whole.model)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in embedding(resumed.model).items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(halfway[name], value) for name, value in expected.items())


def test_checkpoint_loads_as_a_merged_model(make_trainer, tmp_path):
    trainer = make_trainer("run", 5)
    trainer.train()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-5")
    assert loaded.merge_config.r == 4
    assert all(torch.equal(value, embedding(loaded)[name]) for name, value in embedding(trainer.model).items())
