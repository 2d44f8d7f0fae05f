"""Presets: each public function without arguments returns the config tree of one run, and its name is the preset's.

    mmgpt train PRESET                  # run it
    mmgpt config PRESET                 # look at it

One file per model family or recipe; its docstring gives the command, the chips, the hours and the expected figures.
A new preset is a new function here and nothing else: `mmgpt.presets` lists this folder. Files of this folder import
one another relatively (`from .family import model`), since an installed mmgpt carries it as `mmgpt.configs`.
"""
