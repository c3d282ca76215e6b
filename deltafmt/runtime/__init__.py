"""Deltas on a device: the streaming upload of files, and models that serve deltas.

Where to look, by subject (``docs/architecture.md`` follows one request through these files):

- **A file comes to a device.** ``upload.py``, which asks ``upload_plan.py`` and ``upload_pieces.py`` what goes where;
  ``reading.py`` and ``unlocked.py`` read and copy, through the memory of ``pinned.py``. ``placement.py`` places
  tensors; ``device_delta.py`` and ``device_views.py`` are the result, ``checks.py`` its examination, of which
  ``layout_checks.py`` works out the part that follows from the layout.
- **Deltas come and go.** ``residency.py`` keeps within a budget, with ``leases.py`` and ``eviction.py``; it loads
  through ``delta_store.py``.
- **A delta is attached.** ``attach.py`` (the public face), ``examine.py``, ``binding.py`` and ``model_names.py``
  (which module a tensor belongs to), ``base_check.py``, ``changes.py`` (the model changed since).
- **A call is made.** ``calls.py`` wraps the model, ``scope.py`` knows which ``with`` block holds (with
  ``call_frames.py`` and ``following.py``), ``delta_holds.py`` what it holds. ``rows.py`` reads names and weights.
  ``selection.py`` is the result: a slot for each row. ``computed_by.py`` guards caches of keys and values.
- **Where rows stand inside the model.** ``call_rows.py`` answers; ``row_places.py`` keeps what is known;
  ``follow*.py``, ``owners.py`` and ``batch_inputs.py`` find it out; ``orders.py`` says it as slots of tokens.
- **A delta gets a slot.** ``served_modules.py``, tensor by tensor; ``slot_plan.py``, at once, if its layout is known.
- **A module adds deltas.** ``served_modules.py`` and ``module_hooks.py``; a class for each sort of module in
  ``sites.py`` (linear), ``sites_other.py``, ``experts.py`` and ``substituted.py``. ``shared_inputs.py`` and
  ``product_group.py`` share one launch among q, k and v. ``mixing.py`` sums deltas with weights. ``per_delta.py``,
  ``per_row.py`` and ``uncalled_reads.py`` are for parameters that a model reads by itself.
- **Other ways to run.** ``continuous.py``, ``intake.py``, ``packed.py`` and ``shared_prefixes.py`` (continuous
  batching); ``frames.py``, ``operations.py``, ``compiled_state.py`` and ``compiled_products.py`` (``torch.compile``);
  ``parallel.py``, ``cuts.py`` and ``cut_loading.py`` (several processes); ``merge.py``; ``warmup.py``.
"""
