"""Samplers compared on one model: the plan, the drawing job, its picture and its report."""
