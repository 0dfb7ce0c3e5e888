"""Several devices: the same training as on one. Each case runs in a process of its own, because
TensorFlow takes logical devices only before it first looks at the real ones."""

import json
import os
import subprocess
import sys

import pytest
import standins

from utils import devices, runs

# Two or three processors stand in for GPUs; "auto" means XLA, as it does where there is a GPU.
START = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * {count})
from pathlib import Path
import keras, numpy as np, standins
from keras.src.trainers.trainer import Trainer
from utils import devices, distillation, training
Trainer._resolve_auto_jit_compile = lambda self: True
names = [f"CPU:{{i}}" for i in range({count})]
ONE, ALL = tf.distribute.get_strategy(), devices.strategy(names=names)
folder = Path(sys.argv[1])
def train(strategy, name, batch_size=6, legs=None, dropout=0.0, data=None, **stage):
    with strategy.scope():
        model = standins.make_model(dropout)
    stage = standins.make_stage(folder / name, **stage)
    recipe = standins.make_recipe(legs or standins.make_legs(2, 3), data, batch_size)
    return training.train(stage, "teacher", model, recipe), model, stage
"""


def run(tmp_path, code, count=2):
    """Run `code` after START; what it printed, and what its last line holds as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", START.format(count=count) + code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{runs.root()}:{runs.root() / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "ran out of data" not in done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


TWENTY_STEPS = """
used = set()
step = training.Keeper.on_train_batch_end
def look(self, batch, logs=None):
    step(self, batch, logs)
    values = self.model.trainable_variables[0].value
    used.update(v.device[-5:] for v in getattr(values, "values", [values]))
training.Keeper.on_train_batch_end = look
one, model, _ = train(ONE, "one")
used.clear()
two, mirrored, stage = train(ALL, "two")
compared = ["loss", "val_loss", "val_accuracy", "val_qwk", "accuracy", "qwk"]
apart = max(np.abs(a - b).max() for a, b in zip(model.get_weights(), mirrored.get_weights()))
norms = [l for l in mirrored._flatten_layers() if isinstance(l, keras.layers.BatchNormalization)]
print(json.dumps({
    "one": one.history[compared].to_numpy().tolist(),
    "two": two.history[compared].to_numpy().tolist(),
    "apart": float(apart),
    "used": sorted(used),
    "facts": stage.saved["facts"]["teacher"],
    "synchronized": [l.synchronized for l in norms],
}))
"""


def test_two_devices_train_like_one_at_the_same_global_batch(tmp_path):
    out, found = run(tmp_path, TWENTY_STEPS)
    assert len(found["one"]) == 5, "five epochs of four steps"
    for one, two in zip(found["one"], found["two"], strict=True):
        assert two == pytest.approx(one, abs=2e-4)
    assert found["apart"] < 1e-3
    assert found["used"] == ["CPU:0", "CPU:1"], "it really trained on both"
    assert "teacher: batches of 6 images on 2 devices, 3 on each." in out
    facts = {name: found["facts"][name] for name in ("devices", "batch", "batch_per_device")}
    assert facts == {"devices": 2, "batch": 6, "batch_per_device": 3}
    assert found["synchronized"] == [False], "a saved model must load where nothing is shared"


ALL_ELSE = """
import dataclasses
tf.config.experimental.enable_op_determinism()  # which rules XLA out: not where that is the point
found = {}
def said(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
Keeper = training.Keeper
class Dies(Keeper):
    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        raise KeyboardInterrupt
legs = [training.Leg("all", "all", 2, 0.01, pretrained=False)]
def in_pieces(first, second, name, **options):
    training.Keeper = Dies
    try:
        train(first, name, **options)
    except KeyboardInterrupt:
        pass
    training.Keeper = Keeper
    return standins.without_times(train(second, name, **options)[0].history)
odd = {"legs": legs, "dropout": 0.3, "data": standins.make_images(count=25)}
whole, *_ = train(ALL, "whole", **odd)
pieces = in_pieces(ALL, ALL, "pieces", **odd)
found["resumed"] = standins.without_times(whole.history).equals(pieces)
moved = [in_pieces(*way, name, legs=legs) for name, way in
         {"apart": (ALL, ONE), "together": (ONE, ALL)}.items()]
stayed, *_ = train(ONE, "stayed", legs=legs)
numbers = ["loss", "val_loss", "learning_rate"]
found["moved"] = [history[numbers].to_numpy().tolist() for history in moved]
found["stayed"] = stayed.history[numbers].to_numpy().tolist()

found["rest"] = said(train, ALL, "a", batch_size=5)
several = [dataclasses.replace(legs[0], accumulation=4)]
found["accumulation"] = said(train, ALL, "b", legs=several)
found["xla"] = said(train, ALL, "c", JIT_COMPILE=True)

from test_distillation import make_dataset
with ALL.scope():
    teacher = standins.make_model()
alone = standins.make_model()
alone.set_weights(teacher.get_weights())
data = make_dataset()
looks = []
for model in (alone, teacher):
    for seen in (None, (2, data)):
        pixels = data.pixels("val", standins.SIZE)
        looks.append(distillation.look(model, pixels, seen, 8))
found["looks"] = [float(np.abs(looks[i] - looks[i + 2]).max()) for i in range(2)]

overflow = standins.objectives.HardLoss.call
def on_the_second(self, y_true, y_pred):
    loss, context = overflow(self, y_true, y_pred), tf.distribute.get_replica_context()
    if context is None:
        return loss
    return loss * tf.where(tf.equal(context.replica_id_in_sync_group, 1), 1e37, 1.0)
standins.objectives.HardLoss.call = on_the_second
keras.config.set_dtype_policy("mixed_float16")
with ALL.scope():
    model = standins.make_model()
    recipe = standins.make_recipe(legs, batch_size=6)
    training.compile_leg(model, legs[0], 4, recipe, False)
before = float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale))
model.fit(recipe.batches(0)[0], steps_per_epoch=1, verbose=0, shuffle=False)
after = float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale))
found["skipped"] = after == before / 2 and all(np.isfinite(w).all() for w in model.get_weights())

real, tf.distribute.MirroredStrategy = tf.distribute.MirroredStrategy, None
def refuses(names):
    raise tf.errors.InternalError(None, None, "NCCL: unhandled system error")
tf.distribute.MirroredStrategy = refuses
found["alone"] = devices.strategy(names=names).num_replicas_in_sync
tf.distribute.MirroredStrategy = real
found["one of two"] = devices.strategy(1, names).num_replicas_in_sync
found["five of two"] = devices.strategy(5, names).num_replicas_in_sync
print(json.dumps(found))
"""


def test_resume_refusals_and_fall_back_with_two_devices(tmp_path):
    out, found = run(tmp_path, ALL_ELSE)
    # 25 images of val: a last batch of one would leave a device without any.
    assert found["resumed"], "killed after an epoch, with dropout"
    for history in found["moved"]:  # gone on with more devices, or fewer
        for moved, stayed in zip(history, found["stayed"], strict=True):
            assert moved == pytest.approx(stayed, abs=2e-4)
    assert "BATCH_SIZE = 5 cannot be divided over 2 devices" in found["rest"]
    assert "set it to 4 or 6, or DEVICES = 1" in found["rest"]
    assert "ACCUMULATION = 4" in found["accumulation"] and "DEVICES = 1" in found["accumulation"]
    assert "JIT_COMPILE = True" in found["xla"] and "DEVICES = 1" in found["xla"]
    assert max(found["looks"]) < 1e-5
    assert found["skipped"], "an overflow on the second device spoils the weights"
    assert found["alone"] == 1
    assert "2 devices cannot be used together (NCCL: unhandled system error): one is." in out
    assert found["one of two"] == 1 and found["five of two"] == 2
    assert "DEVICES = 5, but there are 2." in out


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8])
def test_no_share_is_empty_and_all_but_the_last_are_even(replicas):
    for count in (*range(200, 260), 825, 826):
        for batch_size in range(replicas, 20):
            size = devices.share_size(count, batch_size, replicas)
            rest = count % size
            assert size % replicas == 0
            # TensorFlow fills one device after the other.
            assert not rest or rest > -(-rest // replicas) * (replicas - 1), (count, size)
    assert devices.share_size(825, 8, 1) == 8 and devices.share_size(825, 8, 2) == 6


def test_too_few_images_for_the_devices_are_refused():
    with pytest.raises(ValueError, match="1 images cannot be shared by 2 devices"):
        devices.share_size(1, 8, 2)


@pytest.mark.parametrize(
    ("batch_size", "replicas", "said"), [(1, 2, "set it to 2,"), (9, 4, "set it to 8 or 12,")]
)
def test_a_batch_with_a_rest_is_refused_with_the_nearest_that_has_none(batch_size, replicas, said):
    with pytest.raises(ValueError, match=f"STUDENT_BATCH_SIZE = {batch_size}.*{said}"):
        devices.check_shares("STUDENT_BATCH_SIZE", batch_size, 1, replicas)
    devices.check_shares("STUDENT_BATCH_SIZE", 2 * replicas, 1, replicas)
    devices.check_shares("BATCH_SIZE", batch_size, 4, 1)


def test_without_a_gpu_there_is_one_device(capsys):
    assert devices.strategy(4).num_replicas_in_sync == 1
    assert "DEVICES = 4, but there is one." in capsys.readouterr().out
    assert devices.replicas_of(standins.make_model()) == 1
