"""Studies: commands strung together by Snakemake; no mathematics here."""
