"""Whatever is sent to it, the server neither fails nor sticks nor grows."""
