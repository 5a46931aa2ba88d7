"""The numbers of the original implementation, from the recordings in $TRM_PARITY_DIR (default ../shared/parity).

Without the folder these tests skip and say so; a wrong number fails.
"""
import json
import os
import unittest
from pathlib import Path

import numpy as np
import torch

import trm_model
from adam_atan2 import AdamATan2, PuzzleEmbeddingSGD, lr_at
from device import Device
from ema_distributed import EMADistributed
from tests.helpers import XLATest
from trm_model import CHECKPOINT_PREFIX, Carry
from utils import ModelConfig

PARITY_DIR = Path(os.environ.get("TRM_PARITY_DIR", Path(__file__).resolve().parent.parent.parent / "shared" / "parity"))
RECORDINGS = sorted(PARITY_DIR.glob("*.npz"))
METRICS = {"count": "count", "cell_accuracy": "accuracy", "exact_accuracy": "exact_accuracy",
           "q_halt_accuracy": "q_halt_accuracy", "steps": "steps", "lm_loss": "lm_loss", "q_halt_loss": "q_halt_loss"}


class Recording:
    """One .npz with the model it was made with, on a device."""

    def __init__(self, path, device="cpu"):
        self.arrays, self.device = np.load(path, allow_pickle=False), torch.device(device)
        self.meta = json.loads(str(self.arrays["meta"]))
        given = {k: v for k, v in self.meta["model"].items() if k in ModelConfig.__dataclass_fields__}
        self.config, self.steps = ModelConfig(**given), self.meta["steps"]

    def model(self, prefix):
        model = trm_model.TinyRecursiveModel(self.config, self.meta["model"]["seq_len"], self.meta["model"]["vocab_size"],
                                             self.meta["model"]["num_puzzle_identifiers"])
        state = self.tensors("init/") | self.tensors(prefix)      # H_init and L_init stand in init/ only
        assert trm_model.load_named_state(model, state, "recording") == []
        return model.to(self.device)

    def tensors(self, prefix):
        return {k.removeprefix(prefix): torch.tensor(self.arrays[k]) for k in self.arrays.files if k.startswith(prefix)}

    def batch(self, prefix):
        return {k: self.integers(prefix + k).to(self.device) for k in ("inputs", "labels", "puzzle_identifiers")}

    def integers(self, key):
        tensor = torch.tensor(self.arrays[key])
        return torch.where(tensor == -100, 0, tensor) if key.endswith("labels") else tensor

    def carry(self, prefix):
        values = self.tensors(prefix) | {"labels": self.integers(prefix + "labels")}
        return Carry(**{k: v.to(self.device) for k, v in values.items()})

    def train(self, step, model, carry):
        """Loss, metrics, gradients and next carry of one recorded training step, as train_tpu computes them."""
        carry = model.admit(carry, self.batch(f"train/step{step}/"))
        rows = model.puzzle_rows(carry).requires_grad_()
        loss, metrics, after = trm_model.act_step(model, carry, rows, torch.zeros_like(carry.steps))
        names, params = zip(*model.named_parameters())
        *grads, row_grads = torch.autograd.grad(loss / len(carry.steps), [*params, rows])
        if str(self.device).startswith("xla"):
            import torch_xla
            torch_xla.sync()        # one program for all of it, and not one for each tensor that is looked at
        return loss, metrics, dict(zip(names, grads)), row_grads, after


class Parity:
    """What the tests on the two devices share."""

    def setUp(self):
        if not RECORDINGS:
            self.skipTest(f"no recordings (*.npz) in {PARITY_DIR}: set TRM_PARITY_DIR")

    def close(self, ours, recorded, what, tolerance=1e-6):
        """max |ours - recorded| <= tolerance * max(1, max |recorded|)."""
        ours, recorded = np.asarray(ours.detach().cpu(), np.float64), np.asarray(recorded, np.float64)
        what = f"{self.recording_name}: {what}"
        self.assertEqual(ours.shape, recorded.shape, what)
        error = np.abs(ours - recorded).max() / max(1.0, np.abs(recorded).max())
        self.assertLessEqual(error, tolerance, what)

    def each(self, device="cpu"):
        for path in RECORDINGS:
            self.recording_name = path.name
            yield Recording(path, device)

    def check_evaluation(self, device, tolerance):
        """Four supervision steps. The chain of states is kept on the CPU, where each step is that of the recording
        to the last bits: the network multiplies a difference of 1e-6 in its state to 1e-4 within two steps."""
        for recording in self.each():
            arrays, batch = recording.arrays, recording.batch("eval/")
            model, on_device = recording.model("init/"), recording.model("init/").to(device)
            carry = model.empty_carry(recording.meta["model"]["batch_size"])
            for k in range(4):
                carry = model.admit(carry, batch)
                start = Carry(*(t.to(device) for t in carry))
                with torch.no_grad():
                    _, _, logits, q_halt = on_device.supervision_step(start, on_device.puzzle_rows(start))
                    result = trm_model.evaluation_step(on_device, start, {k: t.to(device) for k, t in batch.items()})[1]
                    z_H, z_L, _, _ = model.supervision_step(carry, model.puzzle_rows(carry))
                for ours, key in ((logits, "logits"), (q_halt, "q_halt_logits"), (result[3].sum(), "lm_loss_sum"),
                                  (result[4].sum(), "q_halt_loss_sum"), ((result[3] + 0.5 * result[4]).sum(), "loss_sum")):
                    self.close(ours, arrays[f"eval/step{k}/{key}"], f"{key} of step {k}", tolerance)
                carry = carry._replace(z_H=z_H, z_L=z_L)

    def check_training_steps(self, device, tolerance):
        for recording in self.each(device):
            for t in range(1, recording.steps + 1):
                prefix = f"train/step{t}/"
                model = recording.model(prefix + "before/")
                loss, metrics, grads, row_grads, after = recording.train(t, model, recording.carry(prefix + "carry_before/"))
                self.close(loss, recording.arrays[prefix + "loss_sum"], f"loss of step {t}", tolerance)
                for key, value in zip(trm_model.METRIC_KEYS, metrics):
                    self.close(value, recording.arrays[f"{prefix}metric/{METRICS[key]}"], f"{key} of step {t}", tolerance)
                for name, grad in grads.items():
                    self.close(grad, recording.arrays[f"{prefix}grad/{CHECKPOINT_PREFIX}{name}"], f"gradient of {name}, step {t}", tolerance)
                self.close(row_grads, recording.arrays[prefix + "grad_puzzle_rows"], f"gradient of the puzzle rows, step {t}", tolerance)
                for key, value in recording.carry(prefix + "carry_after/")._asdict().items():
                    self.close(getattr(after, key).float(), value.cpu(), f"carry {key} after step {t}", tolerance)


class ParityTest(Parity, unittest.TestCase):
    def test_evaluation_on_cpu(self):
        self.check_evaluation("cpu", 1e-6)

    def test_training_steps_on_cpu(self):
        self.check_training_steps("cpu", 1e-6)

    def test_optimizers_on_recorded_gradients(self):
        for recording in self.each():
            train, arrays = recording.meta["train"], recording.arrays
            model = recording.model("init/")
            optimizer = AdamATan2(model.parameters(), 0.0, (train["beta1"], train["beta2"]), train["weight_decay"])
            puzzle_optimizer = PuzzleEmbeddingSGD(model.puzzle_emb.weights, train["puzzle_emb_weight_decay"])
            for t in range(1, recording.steps + 1):
                prefix, following = f"train/step{t}/", f"train/step{t + 1}/before/" if t < recording.steps else "final/"
                for name, p in model.named_parameters():
                    p.grad = torch.tensor(arrays[f"{prefix}grad/{CHECKPOINT_PREFIX}{name}"])
                optimizer.param_groups[0]["lr"] = float(arrays[prefix + "lr"])
                optimizer.step()
                row_sums = puzzle_optimizer.row_sums(recording.integers(prefix + "carry_after/puzzle_identifiers"),
                                                     torch.tensor(arrays[prefix + "grad_puzzle_rows"]))
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
                    self.assertAlmostEqual(ours, float(recording.arrays[f"train/step{t}/{key}"]), delta=1e-12)

    def test_closed_loop_and_ema(self):
        """Several steps in a row: AdamATan2's first updates hang on the sign of gradients near zero, so the last
        bit of a sum decides a whole learning rate; losses stay within 1%, the weight change within a cosine of 0.99."""
        for recording in self.each():
            train, arrays = recording.meta["train"], recording.arrays
            model = recording.model("init/")
            ema = EMADistributed(model, train["ema_rate"], Device("cpu"))
            optimizer = AdamATan2(model.parameters(), 0.0, (train["beta1"], train["beta2"]), train["weight_decay"])
            puzzle_optimizer = PuzzleEmbeddingSGD(model.puzzle_emb.weights, train["puzzle_emb_weight_decay"])
            carry = recording.carry("train/step1/carry_before/")
            for t in range(1, recording.steps + 1):
                loss, _, grads, row_grads, carry = recording.train(t, model, carry)
                recorded = float(arrays[f"train/step{t}/loss_sum"])
                self.assertLess(abs(loss.item() - recorded), 0.01 * recorded, f"loss of step {t}")
                for name, p in model.named_parameters():
                    p.grad = grads[name]
                optimizer.param_groups[0]["lr"] = lr_at(t, train["lr"], train["warmup"], 10_000, 1.0)
                optimizer.step()
                puzzle_optimizer.step(*puzzle_optimizer.row_sums(carry.puzzle_identifiers, row_grads), lr_at(t, train["puzzle_emb_lr"], train["warmup"], 10_000, 1.0))
                ema.update_in_step(model)
            for label, ours in (("final/", model), ("final_ema/", ema.module)):
                start, end = self.flat(recording, "init/", ours), self.flat(recording, label, ours)
                change, recorded = np.concatenate([p.detach().numpy().ravel() for _, p in ours.named_parameters()]) - start, end - start
                cosine = change @ recorded / np.linalg.norm(change) / np.linalg.norm(recorded)
                self.assertGreater(cosine, 0.99, label)
                self.assertAlmostEqual(np.linalg.norm(change) / np.linalg.norm(recorded), 1.0, delta=0.01, msg=label)

    def flat(self, recording, prefix, model):
        return np.concatenate([recording.arrays[prefix + CHECKPOINT_PREFIX + name].astype(np.float64).ravel()
                               for name, _ in model.named_parameters()])


class ParityOnXLATest(Parity, XLATest):
    """The same on torch_xla's CPU device, where the loss is float32 (a TPU has no float64) and matrix products
    and roots are XLA's own: float32 accuracy over a dozen calls of the network is 1e-5 there."""

    def test_evaluation_on_xla(self):
        self.check_evaluation(self.device, 1e-5)

    def test_training_steps_on_xla(self):
        self.check_training_steps(self.device, 1e-5)


if __name__ == "__main__":
    unittest.main()
