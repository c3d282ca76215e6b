"""The jobs behind the commands: pack, unpack, verify, repack, inspect, diff."""
