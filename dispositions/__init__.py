"""The command line: parse, call, print."""

import os

# OpenMP's threads spin at a barrier before they sleep. By its own default they bring each other to a halt as soon as
# another job shares the cores; a short spin costs a fifth when alone and a third when not (measured on the organism).
# It has to be said before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
