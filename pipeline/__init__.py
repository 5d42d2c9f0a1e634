"""qalign: preference alignment on Ray. Read the modules in the order that README.md gives."""
