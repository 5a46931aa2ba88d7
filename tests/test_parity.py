"""The numbers of the original implementation, from recordings, and those of float64.

The recordings are in $TRM_PARITY_DIR (default: ../shared/parity). Without this folder their tests
are skipped, with a message. A wrong number fails. Those of float64 (tests/exact.py) need no
recordings.

Processors and compilers add up in different orders, and the rounding error grows with each call of
the network. How much it may grow is computed for the model at hand, and is no constant of these
tests: what was recorded and what we compute must both be that near to float64.
"""

import copy
import json
import os
import unittest
from pathlib import Path

import numpy as np
import torch

import trm_model
from adam_atan2 import AdamATan2, PuzzleEmbeddingSGD, lr_at
from config import ModelConfig
from device import Device
from ema_distributed import EMADistributed
from tests import exact
from tests.helpers import XLATest
from tests.test_model import on_device
from trm_model import CHECKPOINT_PREFIX, Carry

PARITY_DIR = Path(
    os.environ.get(
        "TRM_PARITY_DIR", Path(__file__).resolve().parent.parent.parent / "shared" / "parity"
    )
)
RECORDINGS = sorted(PARITY_DIR.glob("*.npz"))
METRICS = {
    "count": "count",
    "cell_accuracy": "accuracy",
    "exact_accuracy": "exact_accuracy",
    "q_halt_accuracy": "q_halt_accuracy",
    "steps": "steps",
}
# of an evaluation
RECORDED = {
    "q_halt": "q_halt_logits",
    "loss": "loss_sum",
    "lm_loss": "lm_loss_sum",
    "q_halt_loss": "q_halt_loss_sum",
}


class Recording:
    """One .npz with the model it was made with, on a device."""

    def __init__(self, path, device="cpu"):
        self.arrays, self.device = np.load(path, allow_pickle=False), torch.device(device)
        self.meta = json.loads(str(self.arrays["meta"]))
        given = {
            k: v for k, v in self.meta["model"].items() if k in ModelConfig.__dataclass_fields__
        }
        self.config, self.steps = ModelConfig(**given), self.meta["steps"]

    def model(self, prefix):
        model = trm_model.TinyRecursiveModel(
            self.config,
            self.meta["model"]["seq_len"],
            self.meta["model"]["vocab_size"],
            self.meta["model"]["num_puzzle_identifiers"],
        )
        state = self.tensors("init/") | self.tensors(
            prefix
        )  # H_init and L_init stand in init/ only
        assert trm_model.load_named_state(model, state, "recording") == []
        return on_device(model, self.device)

    def tensors(self, prefix):
        return {
            k.removeprefix(prefix): torch.tensor(self.arrays[k])
            for k in self.arrays.files
            if k.startswith(prefix)
        }

    def batch(self, prefix):
        return {
            k: self.integers(prefix + k).to(self.device)
            for k in ("inputs", "labels", "puzzle_identifiers")
        }

    def integers(self, key):
        tensor = torch.tensor(self.arrays[key])
        return torch.where(tensor == -100, 0, tensor) if key.endswith("labels") else tensor

    def carry(self, prefix):
        values = self.tensors(prefix) | {"labels": self.integers(prefix + "labels")}
        return Carry(**{k: v.to(self.device) for k, v in values.items()})

    def train(self, step, model, carry):
        """(loss, metrics, gradients, those of the puzzle rows, next carry) of a recorded step."""
        carry = model.admit(carry, self.batch(f"train/step{step}/"))
        rows = model.puzzle_rows(carry).requires_grad_()
        loss, metrics, after = trm_model.act_step(model, carry, rows, torch.zeros_like(carry.steps))
        names, params = zip(*model.named_parameters())
        *grads, row_grads = torch.autograd.grad(loss / len(carry.steps), [*params, rows])
        if str(self.device).startswith("xla"):
            import torch_xla

            # one program for everything, and not one for each tensor that is compared
            torch_xla.sync()
        return loss, metrics, dict(zip(names, grads)), row_grads, after


class Parity:
    """What the tests on the two devices share."""

    def setUp(self):
        if not RECORDINGS:
            self.skipTest(f"no recordings (*.npz) in {PARITY_DIR}: set TRM_PARITY_DIR")

    def close(self, ours, recorded, what, tolerance=1e-6):
        """max |ours - recorded| <= tolerance * max(1, max |recorded|)."""
        ours, recorded = (
            np.asarray(ours.detach().cpu(), np.float64),
            np.asarray(recorded, np.float64),
        )
        what = f"{self.recording_name}: {what}"
        self.assertEqual(ours.shape, recorded.shape, what)
        error = np.abs(ours - recorded).max() / max(1.0, np.abs(recorded).max())
        self.assertLessEqual(error, tolerance, what)

    def each(self, device="cpu"):
        for path in RECORDINGS:
            self.recording_name = path.name
            yield Recording(path, device)

    def within(self, exact_values, tolerances, given, what):
        """Each array of `given`, {name: array}, is within its tolerance of the value in float64."""
        for name, value in given.items():
            ratio = exact.distance(torch.as_tensor(value), exact_values[name]) / tolerances[name]
            self.assertLessEqual(
                ratio,
                1,
                f"{self.recording_name}: {name}, {what}: its share of the tolerance, "
                f"{tolerances[name]:.1e}",
            )

    def check_evaluation(self, device):
        """Four supervision steps, each from the states of the one before."""
        for recording in self.each():
            batch, model = recording.batch("eval/"), recording.model("init/")
            carry = model.admit(model.empty_carry(recording.meta["model"]["batch_size"]), batch)
            limits = float64(model, carry, 4)
            there = on_device(model, device)
            carry, batch = (
                Carry(*(t.to(device) for t in carry)),
                {name: t.to(device) for name, t in batch.items()},
            )
            for k in range(4):
                with torch.no_grad():
                    _, _, logits, q_halt = there.supervision_step(carry, there.puzzle_rows(carry))
                    carry, result = trm_model.evaluation_step(there, carry, batch)
                carry = carry._replace(halted=torch.zeros_like(carry.halted))
                lm_loss, q_halt_loss = result[3].sum(), result[4].sum()
                ours = {
                    "logits": logits,
                    "q_halt": q_halt,
                    "lm_loss": lm_loss,
                    "q_halt_loss": q_halt_loss,
                    "loss": lm_loss + 0.5 * q_halt_loss,
                }
                recorded = {
                    name: recording.arrays[f"eval/step{k}/{RECORDED.get(name, name)}"]
                    for name in ours
                }
                self.within(*limits[k], ours, f"step {k}, ours")
                self.within(*limits[k], recorded, f"step {k}, recorded")

    def check_training_steps(self, device):
        for recording in self.each(device):
            for t in range(1, recording.steps + 1):
                prefix = f"train/step{t}/"
                model, before = (
                    recording.model(prefix + "before/"),
                    recording.carry(prefix + "carry_before/"),
                )
                loss, metrics, grads, row_grads, after = recording.train(t, model, before)
                metrics = dict(zip(trm_model.METRIC_KEYS, metrics))
                ours = {
                    "loss": loss,
                    "lm_loss": metrics.pop("lm_loss"),
                    "q_halt_loss": metrics.pop("q_halt_loss"),
                    **grads,
                    "puzzle_rows": row_grads,
                    "z_H": after.z_H,
                    "z_L": after.z_L,
                }
                places = {
                    "loss": "loss_sum",
                    "puzzle_rows": "grad_puzzle_rows",
                    **{name: f"grad/{CHECKPOINT_PREFIX}{name}" for name in grads},
                    **{name: f"metric/{name}" for name in ("lm_loss", "q_halt_loss")},
                    **{name: f"carry_after/{name}" for name in ("z_H", "z_L")},
                }
                recorded = {
                    name: recording.arrays[prefix + place] for name, place in places.items()
                }
                on_cpu, before = model.cpu(), Carry(*(tensor.cpu() for tensor in before))
                batch = {name: tensor.cpu() for name, tensor in recording.batch(prefix).items()}
                (limits,) = float64(on_cpu, on_cpu.admit(before, batch))
                self.within(*limits, ours, f"step {t}, ours")
                self.within(*limits, recorded, f"step {t}, recorded")
                for name, value in metrics.items():  # counts and shares
                    self.close(
                        value,
                        recording.arrays[f"{prefix}metric/{METRICS[name]}"],
                        f"{name} of step {t}",
                    )
                for name, value in recording.carry(prefix + "carry_after/")._asdict().items():
                    if name not in ours:
                        self.close(
                            getattr(after, name).float(),
                            value.cpu(),
                            f"carry {name} after step {t}",
                        )


class ParityTest(Parity, unittest.TestCase):
    def test_evaluation_on_cpu(self):
        self.check_evaluation("cpu")

    def test_training_steps_on_cpu(self):
        self.check_training_steps("cpu")

    def test_optimizers_on_recorded_gradients(self):
        for recording in self.each():
            train, arrays = recording.meta["train"], recording.arrays
            model = recording.model("init/")
            betas = train["beta1"], train["beta2"]
            optimizer = AdamATan2(model.parameters(), betas, train["weight_decay"])
            puzzle_optimizer = PuzzleEmbeddingSGD(
                model.puzzle_emb.weights, train["puzzle_emb_weight_decay"]
            )
            for t in range(1, recording.steps + 1):
                prefix, following = (
                    f"train/step{t}/",
                    f"train/step{t + 1}/before/" if t < recording.steps else "final/",
                )
                for name, p in model.named_parameters():
                    p.grad = torch.tensor(arrays[f"{prefix}grad/{CHECKPOINT_PREFIX}{name}"])
                optimizer.step(float(arrays[prefix + "lr"]))
                row_sums = puzzle_optimizer.row_sums(
                    recording.integers(prefix + "carry_after/puzzle_identifiers"),
                    torch.tensor(arrays[prefix + "grad_puzzle_rows"]),
                )
                puzzle_optimizer.step(*row_sums, float(arrays[prefix + "puzzle_emb_lr"]))
                for name, value in trm_model.named_state(model).items():
                    if following + name in arrays:
                        self.close(value, arrays[following + name], f"{name} after step {t}", 3e-8)

    def test_schedule(self):
        for recording in self.each():
            train = recording.meta["train"]
            for t in range(1, recording.steps + 1):
                for key in ("lr", "puzzle_emb_lr"):
                    ours = lr_at(t, train[key], train["warmup"], 10_000, 1.0)
                    self.assertAlmostEqual(
                        ours, float(recording.arrays[f"train/step{t}/{key}"]), delta=1e-12
                    )

    def test_closed_loop_and_ema(self):
        """Several steps in a row.

        AdamATan2's first updates depend on the sign of a gradient, also near zero, so that the last
        bit of a sum decides about a whole learning rate. Losses stay within 1%, and the cosine
        between the changes of the weights above 0.99.
        """
        for recording in self.each():
            train, arrays = recording.meta["train"], recording.arrays
            model = recording.model("init/")
            ema = EMADistributed(model, train["ema_rate"], Device("cpu"))
            betas = train["beta1"], train["beta2"]
            optimizer = AdamATan2(model.parameters(), betas, train["weight_decay"])
            puzzle_optimizer = PuzzleEmbeddingSGD(
                model.puzzle_emb.weights, train["puzzle_emb_weight_decay"]
            )
            carry = recording.carry("train/step1/carry_before/")
            for t in range(1, recording.steps + 1):
                loss, _, grads, row_grads, carry = recording.train(t, model, carry)
                recorded = float(arrays[f"train/step{t}/loss_sum"])
                self.assertLess(abs(loss.item() - recorded), 0.01 * recorded, f"loss of step {t}")
                for name, p in model.named_parameters():
                    p.grad = grads[name]
                optimizer.step(lr_at(t, train["lr"], train["warmup"], 10_000, 1.0))
                puzzle_optimizer.step(
                    *puzzle_optimizer.row_sums(carry.puzzle_identifiers, row_grads),
                    lr_at(t, train["puzzle_emb_lr"], train["warmup"], 10_000, 1.0),
                )
                ema.update_in_step(model)
            for label, ours in (("final/", model), ("final_ema/", ema.module)):
                start, end = self.flat(recording, "init/", ours), self.flat(recording, label, ours)
                change, recorded = (
                    np.concatenate([p.detach().numpy().ravel() for _, p in ours.named_parameters()])
                    - start,
                    end - start,
                )
                cosine = change @ recorded / np.linalg.norm(change) / np.linalg.norm(recorded)
                self.assertGreater(cosine, 0.99, label)
                self.assertAlmostEqual(
                    np.linalg.norm(change) / np.linalg.norm(recorded), 1.0, delta=0.01, msg=label
                )

    def flat(self, recording, prefix, model):
        return np.concatenate(
            [
                recording.arrays[prefix + CHECKPOINT_PREFIX + name].astype(np.float64).ravel()
                for name, _ in model.named_parameters()
            ]
        )


class ParityOnXLATest(Parity, XLATest):
    """The same on torch_xla's CPU device.

    There the loss is float32, as on a TPU, which has no float64, and sums have another order.
    """

    def test_evaluation_on_xla(self):
        self.check_evaluation(self.device)

    def test_training_steps_on_xla(self):
        self.check_training_steps(self.device)


class Float64:
    """Models of several depths against float64; what the tests on the two devices share."""

    def check(self, device):
        for mlp_t in (True, False):
            for H_cycles, L_cycles, hidden_size in ((1, 1, 32), (3, 4, 96)):
                self.recording_name = (
                    f"{'token MLP' if mlp_t else 'attention'}, H_cycles {H_cycles}, "
                    f"L_cycles {L_cycles}, hidden_size {hidden_size}"
                )
                model, carry = deep_model(H_cycles, L_cycles, hidden_size, mlp_t)
                (limits,) = float64(model, carry)
                Parity.within(self, *limits, results(model, carry, device), str(device))

    def check_products(self, device):
        """An error of exact.ROUNDING is enough for sums as long as those of these models."""
        generator = torch.Generator().manual_seed(0)
        for length in (32, 96, 256):
            a, b = (
                torch.randn(256, length, generator=generator),
                torch.randn(length, 256, generator=generator),
            )
            ours, expected = (a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double()
            self.assertLess(
                ((ours - expected).norm() / expected.norm()).item(), exact.ROUNDING, length
            )


class Float64Test(Float64, unittest.TestCase):
    def test_on_cpu(self):
        self.check("cpu")

    def test_products_on_cpu(self):
        self.check_products("cpu")

    def test_what_float32_may_lose_follows_from_the_depth(self):
        """It grows by about 1.16 with each call of the network, from a few units at the first."""
        tolerances = []
        for H_cycles, L_cycles in ((1, 1), (1, 3), (2, 3), (3, 3), (4, 4)):
            model, carry = deep_model(H_cycles, L_cycles, 32, True)
            tolerances.append(float64(model, carry)[0][1]["z_H"])
        self.assertEqual(tolerances, sorted(tolerances))
        self.assertLess(tolerances[0], 5e-6)
        calls = 4 * (4 + 1)
        self.assertTrue(
            1.1 < (tolerances[-1] / tolerances[0]) ** (1 / (calls - 2)) < 1.25, tolerances
        )


class Float64OnXLATest(Float64, XLATest):
    def test_on_xla(self):
        self.check(self.device)

    def test_products_on_xla(self):
        self.check_products(self.device)


def float64(model, carry, count=1):
    """exact.tolerances of `count` steps of a model, on the CPU, from an admitted carry."""
    weights = dict(model.named_parameters())
    rows = model.puzzle_rows(carry)
    return exact.tolerances(model.config, weights, carry, rows, model.rope, count=count)


def deep_model(H_cycles, L_cycles, hidden_size, mlp_t):
    """(model, admitted carry of two examples); every weight is random, and none is 0."""
    config = ModelConfig(
        hidden_size=hidden_size,
        num_heads=4,
        H_cycles=H_cycles,
        L_cycles=L_cycles,
        puzzle_emb_ndim=hidden_size,
        puzzle_emb_len=4,
        halt_max_steps=4,
        forward_dtype="float32",
        mlp_t=mlp_t,
        pos_encodings="none" if mlp_t else "rope",
    )
    model, generator = (
        trm_model.TinyRecursiveModel(config, 81, 11, 2, seed=1),
        torch.Generator().manual_seed(2),
    )
    model.puzzle_emb.weights.normal_(generator=generator)
    torch.nn.init.normal_(model.q_head.weight, std=hidden_size**-0.5, generator=generator)
    labels = torch.randint(2, 11, (2, 81), generator=generator)
    inputs = torch.where(torch.rand(2, 81, generator=generator) < 0.4, labels, 1)
    batch = {"inputs": inputs, "labels": labels, "puzzle_identifiers": torch.tensor([0, 1])}
    return model, model.admit(model.empty_carry(2), batch)


def results(model, carry, device):
    """A training step's results on a device, by the names of exact.step."""
    rows = model.puzzle_rows(carry).to(device).requires_grad_()
    carry, model = (
        Carry(*(tensor.to(device) for tensor in carry)),
        on_device(copy.deepcopy(model), device),
    )
    logits, q_halt = model.supervision_step(carry, rows)[2:]
    loss, metrics, after = trm_model.act_step(model, carry, rows, torch.zeros_like(carry.steps))
    names, weights = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss / len(carry.steps), [*weights, rows])
    if str(device).startswith("xla"):
        import torch_xla

        torch_xla.sync()
    return {
        "logits": logits,
        "q_halt": q_halt,
        "z_H": after.z_H,
        "z_L": after.z_L,
        "loss": loss,
        "lm_loss": metrics[-2],
        "q_halt_loss": metrics[-1],
        **dict(zip([*names, "puzzle_rows"], grads)),
    }


if __name__ == "__main__":
    unittest.main()
