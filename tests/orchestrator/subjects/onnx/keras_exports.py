"""Exports the five architectures, as a Keras user writes them, as ONNX: ``python keras_exports.py FOLDER [NAME ...]``.

Runs in an environment of its own with tensorflow-cpu and tf2onnx; `test_onnx_keras.py` builds it.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf2onnx
from tensorflow import keras
from tensorflow.keras import layers

OPSETS = {"lenet5": (11, 17), "facenet": (13,), "vgg16_bn": (15,), "resnet18": (17,), "densenet121": (18,)}
"""What each is written at: old and new ones spread over the architectures."""


def lenet5():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def facenet():
    """Eleven layers and no batch norm."""
    model = keras.Sequential([keras.Input((48, 48, 3)), layers.Rescaling(2.0, offset=-1.0)])
    for width in (32, 64, 128, 128):
        model.add(layers.Conv2D(width, 3, padding="same"))
        model.add(layers.LeakyReLU())
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(128, activation="relu"))
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(2, activation="softmax"))
    return model


def vgg16_bn():
    model = keras.Sequential([keras.Input((32, 32, 3))])
    # layers.Normalization would leave its constants as further inputs of the file, which tf2onnx 1.17 can't help.
    model.add(layers.Rescaling([4.0, 4.0, 4.0], offset=[-2.0, -1.9, -1.8]))
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
            model.add(layers.BatchNormalization())
            model.add(layers.ReLU())
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    for _ in range(2):
        model.add(layers.Dense(512, activation="relu"))
        model.add(layers.Dropout(0.5))
    model.add(layers.Dense(10, activation="softmax"))
    return model


def resnet18():
    def block(x, width, stride):
        y = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(y))
        if stride != 1:
            x = layers.BatchNormalization()(layers.Conv2D(width, 1, stride, use_bias=False)(x))
        return layers.ReLU()(layers.Add()([x, y]))

    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(64, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        x = block(x, width, stride)
    x = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Softmax()(x))


def densenet121():
    return keras.applications.DenseNet121(weights=None, input_shape=(64, 64, 3), classes=10)


def unlike_at_the_start(model):
    """Weights as after training: fresh batch norms do nothing, and an importer that forgets them would pass."""
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            n = layer.gamma.shape[0]
            layer.set_weights(
                [
                    generator.uniform(0.5, 1.5, n), generator.normal(0, 0.2, n),
                    generator.normal(0, 0.2, n), generator.uniform(0.5, 1.5, n),
                ]
            )  # fmt: skip


def main(folder, names):
    for make in (lenet5, facenet, vgg16_bn, resnet18, densenet121):
        if names and make.__name__ not in names:
            continue
        keras.utils.set_random_seed(0)
        model = make()
        unlike_at_the_start(model)
        pixels = np.random.default_rng(1).random((5, *model.input_shape[1:]), dtype=np.float32)
        np.savez(folder / f"{make.__name__}.npz", pixels=pixels, probabilities=model(pixels, training=False).numpy())
        signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="input")]
        function = tf.function(lambda x, model=model: model(x, training=False), input_signature=signature)
        for opset in OPSETS[make.__name__]:
            target = folder / f"{make.__name__}_tf2onnx_{opset}.onnx"
            tf2onnx.convert.from_function(function, signature, opset=opset, output_path=str(target))
        model.export(folder / f"{make.__name__}_keras.onnx", format="onnx", verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
