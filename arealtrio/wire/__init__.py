"""The servers' wire formats as pure functions: bytes in, records out, no I/O."""
