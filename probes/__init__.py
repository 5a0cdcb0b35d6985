"""Everything that touches a live model: capture it, find directions in it, steer it, and judge what steering shows."""
