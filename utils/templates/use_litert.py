import json
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps

path, model = sys.argv[1:3]  # image.png student_dynamic_8bit.tflite
about = json.load(open(model.replace(".tflite", ".json"), encoding="utf-8"))
image = ImageOps.exif_transpose(Image.open(path))
if image.mode.startswith("I"):  # more than 8 bits: scale as the training data was
    gray = np.asarray(image, "float32")
    top = np.quantile(gray, 0.999, method="lower")
    bits = about["bits"] or next(bits for bits in (8, 10, 12, 14, 16) if top < 2**bits)
    image = Image.fromarray(np.clip(np.round(gray * (255 / (2**bits - 1))), 0, 255).astype("uint8"))
image = image.convert("L")
for side in about["sides"]:  # a square with black bars, as stored, then as the model takes it
    small = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
    image = Image.new("L", (side, side))
    image.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
student = Interpreter(model)
student.allocate_tensors()
student.set_tensor(student.get_input_details()[0]["index"], np.asarray(image)[None, ..., None])
student.invoke()
shares = student.get_tensor(student.get_output_details()[0]["index"])[0]
print(about["class_names"][shares.argmax()], shares.round(4).tolist())
