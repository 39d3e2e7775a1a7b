"""Reports: figures for files, and self-contained HTML pages."""
