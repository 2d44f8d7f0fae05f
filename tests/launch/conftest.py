"""Makes `launch/`, which lies beside the package, importable to its tests."""

from mmgpt import presets

presets.load_package("launch")
