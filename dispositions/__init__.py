"""The command line: parse, call, print."""

import os

# Threads that spin at a barrier bring each other to a halt when another job shares the cores; sleeping ones only slow
# down. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
