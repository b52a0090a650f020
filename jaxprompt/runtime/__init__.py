"""The machine: devices, processes, files, signals, caches."""
