"""Everything that touches a live model: capture it, find directions in it, steer it, and judge what steering shows."""

import os

# OpenMP's threads spin at a barrier before they sleep. By its own default they spin so long that they bring each other
# to a halt as soon as another job shares the cores; without any spin a small model runs at half its speed. This lies
# between. It has to be said before torch is imported; whoever sets the variable is left alone.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
