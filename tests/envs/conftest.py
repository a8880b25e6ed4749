"""What tests of several environments share."""

import pytest
import torch


@pytest.fixture
def play():
    """`play(env, step, actions)`: the entries that follow each action, and the start of what comes next."""

    def played(env, step, actions):
        found = []
        for action in actions:
            step["action"] = action
            full, step = env.step_and_maybe_reset(step)
            found.append(full["next"].clone())
        return torch.stack(found), step

    return played
