"""What tests of callbacks share."""

import pytest
from lightning.pytorch import Trainer, seed_everything

from lightning_hyper.training.run import Run


@pytest.fixture
def fit(tmp_path):
    """`fit(model, data, callbacks, frames)`: train in the test's folder, and give the trainer."""

    def trained(model, data, callbacks, frames, **options):
        seed_everything(0, verbose=False)
        trainer = Trainer(
            max_epochs=-1,
            accelerator="cpu",
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, Run(frames)],
            **{
                "logger": False,
                "enable_progress_bar": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                **options,
            },
        )
        trainer.fit(model, data)
        return trainer

    return trained
