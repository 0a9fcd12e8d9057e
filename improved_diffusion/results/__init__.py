"""The reports of a run, a workbook and a page for a browser, made from the files that the run wrote."""
