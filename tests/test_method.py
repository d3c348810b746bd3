"""EMA-GRPO and the policy loss against numbers worked out by hand."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch

import method_without_images
import rl_ema_grpo
from data import Prompt
from rewards import Grader
from rl_ema_grpo import EMAStd, advantages, deal_minibatches, policy_loss


def test_doctests():
    """Examples in the docstrings that no longer hold."""
    assert doctest.testmod(rl_ema_grpo).failed == 0


def test_first_batch_sets_the_moments():
    """Moments that start at 0 make sigma of the first steps about 10 times too small."""
    ema = EMAStd()
    ema.update("QA", [0.0, 1.0, 1.0, 1.0])  # m1 = m2 = 0.75
    assert ema.std("QA") == pytest.approx(math.sqrt(0.75 - 0.75**2))


def test_second_batch_moves_both_moments_by_one_percent():
    """Averaging the std itself, or only one moment, gives another number."""
    ema = EMAStd()
    ema.update("QA", [0.0, 1.0])
    ema.update("QA", [3.0, 1.0])
    m1, m2 = 0.99 * 0.5 + 0.01 * 2.0, 0.99 * 0.5 + 0.01 * 5.0  # 0.515, 0.545
    assert ema.std("QA") == pytest.approx(math.sqrt(m2 - m1 * m1))


def test_advantages_of_two_tasks_and_two_groups():
    """One std for all tasks, a group mean over the task, or the moments taken after the division."""
    ema = EMAStd()
    rewards = [1.0, 0.0, 0.6, 0.5, 0.4, 0.5]
    groups = ["a", "a", "b", "b", "c", "c"]
    tasks = ["QA", "QA", "box", "box", "box", "box"]
    box = math.sqrt((0.36 + 0.25 + 0.16 + 0.25) / 4 - 0.5**2)  # 0.0707
    expected = [1.0, -1.0, 0.05 / box, -0.05 / box, -0.05 / box, 0.05 / box]
    assert advantages(rewards, groups, tasks, ema) == pytest.approx(expected)
    shuffled = [3, 0, 5, 2, 1, 4]  # entries may come in any order
    pick = lambda values: [values[i] for i in shuffled]
    assert advantages(pick(rewards), pick(groups), pick(tasks), EMAStd()) == pytest.approx(
        pick(expected)
    )
    # A second batch that only has QA leaves the other task's moments alone.
    before = ema.std("box")
    second = advantages([1.0, 1.0, 1.0, 0.0], ["d"] * 4, ["QA"] * 4, ema)
    m1 = m2 = 0.99 * 0.5 + 0.01 * 0.75
    assert second == pytest.approx(
        [0.25 / math.sqrt(m2 - m1**2)] * 3 + [-0.75 / math.sqrt(m2 - m1**2)]
    )
    assert ema.std("box") == before


def test_constant_rewards_give_zero_not_nan():
    """0 / 0 where a task's rewards are all the same."""
    ema = EMAStd()
    assert advantages([0.7] * 4, ["a"] * 4, ["QA"] * 4, ema) == [0.0] * 4
    assert ema.std("QA") == 1e-3  # the floor; m2 - m1^2 may also be a little below 0


def test_clip_at_five():
    """A task whose rewards hardly differed so far, then a surprise: one token step of size 10."""
    ema = EMAStd()
    ema.load_state_dict({"QA": [0.5, 0.25]})  # mean 0.5, no spread; the next batch makes sigma 0.05
    assert advantages([1.0, 0.0], ["a", "a"], ["QA", "QA"], ema) == [5.0, -5.0]
    ema.load_state_dict({"QA": [0.5, 0.25]})
    assert advantages([1.0, 0.0], ["a", "a"], ["QA", "QA"], ema, clip=20.0) == pytest.approx(
        [10.0, -10.0]
    )


def test_grpo_and_dr_grpo():
    """The baselines of the ablation: unbiased std + 1e-6, and no division."""
    rewards, groups, tasks = [1.0, 0.0, 0.0, 0.0], ["a"] * 4, ["QA"] * 4
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert advantages(rewards, groups, tasks, EMAStd(), "grpo") == pytest.approx(
        [0.75 / (std + 1e-6)] + [-0.25 / (std + 1e-6)] * 3
    )
    assert advantages(rewards, groups, tasks, EMAStd(), "dr_grpo") == pytest.approx(
        [0.75] + [-0.25] * 3
    )
    with pytest.raises(ValueError, match="reinforce"):
        advantages(rewards, groups, tasks, EMAStd(), "reinforce")


def test_moments_survive_a_restart_and_refuse_nan():
    """The release loses its moving averages on resume; a NaN reward would poison them for good."""
    ema = EMAStd()
    ema.update("QA", [0.0, 1.0])
    other = EMAStd()
    other.load_state_dict(ema.state_dict())
    ema.update("QA", [1.0])
    assert other.std("QA") == 0.5  # a copy, not the same lists
    with pytest.raises(ValueError, match="finite"):
        other.update("QA", [0.5, float("nan")])
    with pytest.raises(KeyError):
        other.std("never seen")


def token_loss(ratio, advantage, **options):
    logps = torch.tensor([math.log(ratio)], requires_grad=True)
    losses, numbers = policy_loss(logps, torch.zeros(1), torch.tensor([advantage]), **options)
    losses.sum().backward()
    return losses.item(), bool(numbers["clip_share"]), logps.grad.item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped, gradient",
    [
        (1.0, 2.0, -2.0, False, -2.0),  # on policy: the gradient of -A * log p
        (1.0, -2.0, 2.0, False, 2.0),
        (1.5, 1.0, -1.3, True, 0.0),  # far enough up: clipped at 1.3, no gradient
        (1.25, 1.0, -1.25, False, -1.25),  # clip_high is 0.3, not 0.2
        (0.5, 1.0, -0.5, False, -0.5),  # a good token became rarer: not clipped
        (0.5, -1.0, 0.8, True, 0.0),  # far enough down: clipped at 0.8
        (2.0, -1.0, 2.0, False, 2.0),  # a bad token became likelier: pushed back
        (5.0, -1.0, 3.0, False, 0.0),  # dual clip: at most 3 |A|
        (5.0, 1.0, -1.3, True, 0.0),  # the dual clip is for negative advantages only
    ],
)
def test_policy_loss(ratio, advantage, loss, clipped, gradient):
    """A wrong sign, a clip on the wrong side, or a dual clip that hits good tokens."""
    assert token_loss(ratio, advantage) == pytest.approx((loss, clipped, gradient), abs=1e-6)


def test_kl_and_truncated_importance_weight():
    """k3 with its arguments swapped, or an importance weight that carries a gradient or scales the KL."""
    logps = torch.tensor([-1.0], requires_grad=True)
    options = dict(ref_logps=torch.tensor([-1.5]), kl_coef=0.1)
    losses, numbers = policy_loss(logps, logps.detach(), torch.zeros(1), **options)
    assert numbers["kl"].item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)  # what is logged
    assert losses.item() == pytest.approx(0.1 * (math.exp(-0.5) + 0.5 - 1))
    losses.sum().backward()
    assert logps.grad.item() == pytest.approx(
        0.1 * (1 - math.exp(-0.5))
    )  # pulls the policy back down
    tis = dict(rollout_logps=torch.tensor([-3.0]), tis_cap=2.0)  # e^2 is cut to 2
    losses, numbers = policy_loss(logps, logps.detach(), torch.ones(1), **tis, **options)
    assert numbers["capped_share"].all()
    assert losses.item() == pytest.approx(-2.0 + 0.1 * (math.exp(-0.5) + 0.5 - 1))


@pytest.mark.parametrize("counts", [[5, 3], [0, 7], [1, 0], [0, 0], [4, 4, 4]])
def test_minibatches_take_every_group_once(counts):
    """Surplus groups that are thrown away, mini-batches of very different size, or ranks that disagree on their number."""
    dealt = [deal_minibatches(counts, rank, 4) for rank in range(len(counts))]
    assert {len(parts) for parts in dealt} == {min(4, sum(counts))}
    for rank, parts in enumerate(dealt):
        assert sorted(i for part in parts for i in part) == list(range(counts[rank]))
    sizes = [sum(map(len, parts)) for parts in zip(*dealt)]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_a_task_of_tiny_spread_keeps_up():
    """The imbalance that the method is made against, learned end to end: without division boxes drown beside QA."""
    right = {
        method: sum(method_without_images.train(method, seed, 60)[-1] for seed in range(2)) / 2
        for method in method_without_images.METHODS
    }
    assert right["ema_grpo"].min() > 0.7  # QA and box
    assert right["dr_grpo"][1] < 0.5 < 0.7 < right["dr_grpo"][0]
    assert right["grpo"][1] < right["ema_grpo"][1]  # it spends more on questions that teach nothing


def test_what_the_prompt_has_opened_is_part_of_the_response():
    """A Thinking checkpoint, whose template ends the prompt with <think>, earns nothing for ever."""
    record = dict(problem_type="multiple choice", answer="B", options=[])
    prompt = Prompt(record, [], None, None, None, {}, opened="<think>\n")
    rollout = rl_ema_grpo.RolloutGroup(prompt, [[1, 2]], [[0.0, 0.0]], [True])
    decoder = SimpleNamespace(
        decode=lambda tokens: f"hm</think><answer>{'AB'[len(tokens)]}</answer>"
    )
    with Grader(workers=1) as grader:
        rl_ema_grpo.grade([rollout], grader, decoder)
    assert rollout.scores[0].reward == 1.5
