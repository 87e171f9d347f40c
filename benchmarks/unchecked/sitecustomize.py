"""For deployment.py only: its SuperNodes also start its own app, which every client refuses.

Python imports a module of this name when it starts, if its folder is in PYTHONPATH.
"""

from silotune.runtime.flower import bundle

bundle.check_bundle = lambda content: None
