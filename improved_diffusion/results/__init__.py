"""The Excel workbook of a run, made from the files that the run wrote."""
