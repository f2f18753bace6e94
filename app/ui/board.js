// The board: adapter cards, when each acts (timeline), where each acts (canvas), and what the policy made of it.
// Its value is plain data, {picks, plan, steps, done, aspect, backdrop}; every edit writes it back whole.
const COLOURS = ['#3b82f6', '#f59e0b', '#10b981', '#ef4444', '#8b5cf6', '#06b6d4', '#84cc16', '#ec4899'];
let state = {picks: []}, written = null, chosen = 0, tool = 'box';

const make = (tag, attributes = {}, ...children) => {
  const svg = ['svg', 'rect', 'line', 'text', 'g', 'circle'].includes(tag);
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
};
const colour = index => COLOURS[index % COLOURS.length];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const round = value => Math.round(value * 1000) / 1000;
const steps = () => Math.max(1, state.steps || 20);

function commit(redraw = true) {
  written = JSON.stringify(state);
  props.value = JSON.parse(written);
  if (redraw) render();
}

// cards

function card(pick, index) {
  const shown = make('output', {class: 'weight'}, pick.weight.toFixed(2));
  const slider = make('input', {
    type: 'range', min: -1, max: 2, step: 0.05, value: pick.weight, 'aria-label': `weight of ${pick.name}`,
    oninput: event => { pick.weight = Number(event.target.value); shown.textContent = pick.weight.toFixed(2); },
    onchange: () => commit(),
  });
  const toggle = (name, label, title) => make('label', {class: 'toggle', title}, make('input', {
    type: 'checkbox', checked: pick[name], 'aria-label': `${label} ${pick.name}`,
    onchange: event => { pick[name] = event.target.checked; commit(); },
  }), label);
  const remove = make('button', {
    type: 'button', class: 'remove', 'aria-label': `remove ${pick.name}`, title: 'remove',
    onclick: () => { state.picks.splice(index, 1); chosen = 0; commit(); },
  }, '×');
  const picture = pick.preview ? make('img', {src: pick.preview, alt: ''}) : make('div', {class: 'blank'}, pick.name.slice(0, 1));
  const score = pick.score === null || pick.score === undefined ? null : make('span', {class: 'score', title: 'how near to the prompt'}, pick.score.toFixed(2));
  return make('article', {class: `card${pick.on ? '' : ' off'}`, style: `--own:${colour(index)}`, 'data-name': pick.name},
    picture,
    make('div', {class: 'body'},
      make('header', {}, make('strong', {}, pick.name), make('span', {class: 'role'}, pick.role || ''), score, remove),
      make('p', {class: 'reason', title: pick.reason || null}, pick.reason || (pick.trigger ? `trigger: ${pick.trigger}` : 'chosen by you')),
      make('div', {class: 'controls'}, slider, shown, toggle('on', 'on', 'use it'), toggle('pinned', 'pin', 'keep it when searching again'))));
}

// when

function lane(pick, index) {
  const width = 1000, height = 64, high = 2;
  const y = weight => height - 6 - clamp(Math.abs(weight), 0, high) / high * (height - 14);
  const box = make('rect', {class: 'span', fill: colour(index), rx: 3});
  const svg = make('svg', {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', class: 'lane'}, box);
  const handles = ['start', 'stop'].map(edge => make('rect', {
    class: 'handle', width: 14, y: 4, height: height - 8, rx: 4, tabindex: 0, role: 'slider', 'aria-label': `${pick.name} ${edge}`,
    'aria-valuemin': 0, 'aria-valuemax': 100,
    onkeydown: event => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (by) { event.preventDefault(); move(edge, pick[edge] + by / steps()); commit(false); place(); }
    },
  }));
  const words = make('span', {class: 'words'});
  const place = () => {
    box.setAttribute('x', pick.start * width); box.setAttribute('width', (pick.stop - pick.start) * width);
    box.setAttribute('y', y(pick.weight)); box.setAttribute('height', height - 6 - y(pick.weight));
    handles.forEach((handle, n) => {
      const at = n ? pick.stop : pick.start;
      handle.setAttribute('x', clamp(at * width - 7, 0, width - 14)); handle.setAttribute('aria-valuenow', Math.round(at * 100));
    });
    words.textContent = `${pick.weight.toFixed(2)} at ${Math.round(pick.start * 100)}–${Math.round(pick.stop * 100)} %`;
  };
  const move = (edge, to) => {
    const least = 1 / steps();
    if (edge === 'start') pick.start = round(clamp(to, 0, pick.stop - least));
    else pick.stop = round(clamp(to, pick.start + least, 1));
  };
  const drag = event => {
    const area = svg.getBoundingClientRect();
    const across = () => (event.clientX - area.left) / area.width;
    const near = edge => Math.abs(pick[edge] - across());
    const edge = Math.min(near('start'), near('stop')) < 0.04 ? (near('start') < near('stop') ? 'start' : 'stop') : 'weight';
    const follow = now => {
      if (edge === 'weight') pick.weight = round((pick.weight < 0 ? -1 : 1) * clamp((area.bottom - 6 - now.clientY) / (area.height - 14) * high, 0.05, high));
      else move(edge, Math.round((now.clientX - area.left) / area.width * steps()) / steps());
      place();
    };
    const end = () => { removeEventListener('pointermove', follow); removeEventListener('pointerup', end); commit(); };
    addEventListener('pointermove', follow); addEventListener('pointerup', end);
    event.preventDefault();
  };
  svg.addEventListener('pointerdown', drag);
  for (let step = 1; step < steps(); step++) svg.append(make('line', {x1: step / steps() * width, x2: step / steps() * width, y1: height - 5, y2: height, class: 'tick'}));
  svg.append(...handles);
  if (state.done) svg.append(make('line', {x1: state.done / steps() * width, x2: state.done / steps() * width, y1: 0, y2: height, class: 'now'}));
  place();
  return make('div', {class: 'row', style: `--own:${colour(index)}`}, make('div', {class: 'name'}, make('strong', {}, pick.name), words), svg);
}

// where

function canvas() {
  const picks = state.picks, pick = picks[chosen];
  const aspect = state.aspect || 1, wide = 384, high = Math.round(wide / aspect);
  const view = make('canvas', {width: wide, height: high, class: 'where', 'aria-label': `region of ${pick.name}: drag a box or paint`});
  const pen = view.getContext('2d');
  const drawRegion = (region, index) => {
    if (!region) return;
    pen.globalAlpha = index === chosen ? 0.55 : 0.3; pen.fillStyle = colour(index);
    if (region.startsWith('data:')) return tinted(region, index);
    const [left, top, right, bottom] = region.split(',').map(Number);
    pen.fillRect(left * wide, top * high, (right - left) * wide, (bottom - top) * high);
    pen.globalAlpha = 1; pen.font = '600 14px sans-serif'; pen.fillStyle = '#fff';
    pen.fillText(picks[index].name, left * wide + 6, top * high + 18);
  };
  const tinted = (region, index) => {
    const mask = new Image();
    mask.onload = () => {
      const layer = make('canvas', {width: wide, height: high}), paint = layer.getContext('2d');
      paint.drawImage(mask, 0, 0, wide, high);
      const pixels = paint.getImageData(0, 0, wide, high);
      for (let n = 0; n < pixels.data.length; n += 4) pixels.data[n + 3] = pixels.data[n];
      paint.putImageData(pixels, 0, 0);
      paint.globalCompositeOperation = 'source-in'; paint.fillStyle = colour(index); paint.fillRect(0, 0, wide, high);
      pen.globalAlpha = index === chosen ? 0.55 : 0.3; pen.drawImage(layer, 0, 0); pen.globalAlpha = 1;
    };
    mask.src = region;
  };
  const redraw = () => {
    pen.globalAlpha = 1; pen.fillStyle = '#7774'; pen.clearRect(0, 0, wide, high); pen.fillRect(0, 0, wide, high);
    const all = () => picks.forEach((each, index) => each.on && drawRegion(each.region, index));
    if (!state.backdrop) return all();
    const back = new Image(); back.onload = () => { pen.drawImage(back, 0, 0, wide, high); all(); }; back.onerror = all; back.src = state.backdrop;
  };
  const at = event => {
    const area = view.getBoundingClientRect();
    return [clamp((event.clientX - area.left) / area.width, 0, 1), clamp((event.clientY - area.top) / area.height, 0, 1)];
  };
  view.addEventListener('pointerdown', event => {
    event.preventDefault();
    const [x, y] = at(event);
    const mask = make('canvas', {width: 128, height: Math.round(128 / aspect)}), paint = mask.getContext('2d');
    if (tool === 'paint') {
      paint.fillRect(0, 0, mask.width, mask.height); paint.fillStyle = paint.strokeStyle = '#fff';
      paint.lineCap = 'round'; paint.lineWidth = 18;
      if (pick.region && pick.region.startsWith('data:')) { const old = new Image(); old.onload = () => { paint.globalCompositeOperation = 'lighten'; paint.drawImage(old, 0, 0, mask.width, mask.height); }; old.src = pick.region; }
    }
    let last = [x, y];
    const follow = now => {
      const [u, v] = at(now);
      if (tool === 'box') {
        pick.region = [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)].map(round).join(',');
        redraw();
      } else {
        paint.beginPath(); paint.moveTo(last[0] * mask.width, last[1] * mask.height); paint.lineTo(u * mask.width, v * mask.height); paint.stroke();
        pen.globalAlpha = 0.5; pen.fillStyle = colour(chosen); pen.beginPath(); pen.arc(u * wide, v * high, 27, 0, 7); pen.fill();
        last = [u, v];
      }
    };
    const end = () => {
      removeEventListener('pointermove', follow); removeEventListener('pointerup', end);
      if (tool === 'paint') pick.region = mask.toDataURL('image/png');
      else if (pick.region) { const [l, t, r, b] = pick.region.split(',').map(Number); if (r - l < 0.02 || b - t < 0.02) pick.region = null; }
      commit();
    };
    addEventListener('pointermove', follow); addEventListener('pointerup', end);
  });
  redraw();
  return view;
}

function edges(pick) {
  const now = pick.region && !pick.region.startsWith('data:') ? pick.region.split(',').map(Number) : [0, 0, 1, 1];
  return ['left', 'top', 'right', 'bottom'].map((edge, n) => make('label', {}, edge, make('input', {
    type: 'number', min: 0, max: 100, step: 1, value: Math.round(now[n] * 100), 'aria-label': `${edge} edge of ${pick.name}, percent`,
    onchange: event => {
      now[n] = round(clamp(Number(event.target.value) / 100, 0, 1));
      if (now[0] < now[2] && now[1] < now[3]) { pick.region = now.join(','); commit(); }
    },
  })));
}

function where() {
  const pick = state.picks[chosen];
  const tab = (each, index) => make('button', {
    type: 'button', class: index === chosen ? 'picked' : '', style: `--own:${colour(index)}`, 'aria-pressed': index === chosen,
    onclick: () => { chosen = index; render(); },
  }, each.name);
  const tools = ['box', 'paint'].map(name => make('button', {
    type: 'button', class: tool === name ? 'picked' : '', 'aria-pressed': tool === name, onclick: () => { tool = name; render(); },
  }, name));
  const clear = make('button', {type: 'button', onclick: () => { pick.region = null; commit(); }}, 'everywhere');
  return make('section', {class: 'region'},
    make('h4', {}, 'Where'),
    make('div', {class: 'bar'}, state.picks.map(tab)), make('div', {class: 'bar'}, tools, clear),
    canvas(), pick.region?.startsWith('data:') ? null : make('div', {class: 'edges'}, edges(pick)),
    make('p', {class: 'hint'}, pick.region ? `${pick.name} acts in its region only.` : `${pick.name} acts everywhere; drag a box to bind it.`));
}

// plan

function plan() {
  if (!state.plan || !state.plan.length) return null;
  const acting = new Set(state.plan.flat().flatMap(branch => Object.keys(branch.weights)));
  const names = state.picks.map(pick => pick.name).filter(name => acting.has(name));
  const strength = (branches, name) => branches.reduce((sum, branch) => sum + Math.abs(branch.weights[name] || 0) * (typeof branch.share === 'number' ? branch.share : 1), 0);
  const rows = names.map(name => {
    const index = state.picks.findIndex(pick => pick.name === name);
    const cells = state.plan.map((branches, step) => {
      const here = strength(branches, name);
      const leads = here > 0 && names.every(other => other === name || strength(branches, other) < here);
      const kept = branches.some(branch => branch.reuse && branch.weights[name]);
      return make('span', {
        class: `cell${leads ? ' leads' : ''}${kept ? ' kept' : ''}${step < state.done ? ' past' : ''}`, style: `--own:${colour(index)};--strength:${clamp(here, 0, 1)}`,
        title: `step ${step + 1}: ${name} ${here.toFixed(2)}${leads ? ', leads' : ''}${kept ? ', from the cache' : ''}`,
      });
    });
    const led = state.plan.filter(branches => strength(branches, name) > 0).length;
    return make('div', {class: 'row', style: `--own:${colour(index)}`}, make('div', {class: 'name'}, make('strong', {}, name), make('span', {class: 'words'}, `acts in ${led} of ${state.plan.length} steps`)), make('div', {class: 'cells'}, cells));
  });
  const passes = state.plan.reduce((sum, branches) => sum + branches.length, 0);
  const cached = state.plan.reduce((sum, branches) => sum + branches.filter(branch => branch.reuse).length, 0);
  const [policy, why] = state.chosen || [];
  return make('section', {class: 'plan'}, make('h4', {}, 'Plan'),
    policy ? make('p', {class: 'hint'}, make('b', {}, policy), ` was chosen: ${why}.`) : null, rows,
    make('p', {class: 'hint'}, `${passes} denoiser passes in ${state.plan.length} steps${cached ? `, ${cached} of them from the cache (hatched)` : ''}. The darker the stronger; a framed cell leads its step.`));
}

function render() {
  const root = element.querySelector('.board');
  if (!root) return;
  chosen = clamp(chosen, 0, Math.max(0, state.picks.length - 1));
  const open = [...root.querySelectorAll('details')].map(each => each.open);
  const held = root.contains(document.activeElement) ? document.activeElement.getAttribute('aria-label') : null;
  root.replaceChildren();
  if (!state.picks.length) {
    root.append(make('p', {class: 'empty'}, 'No adapters yet: press “Find adapters”, add one by name, or write <lora:name:0.8> in the prompt.'));
    return;
  }
  root.append(make('div', {class: 'cards'}, state.picks.map(card)));
  const used = state.picks.map((pick, index) => [pick, index]).filter(([pick]) => pick.on);
  root.append(make('details', {open: open[0] ?? (state.open && innerWidth >= 700)}, make('summary', {}, 'When and where'),
    make('div', {class: 'both'},
      make('section', {class: 'when'}, make('h4', {}, 'When'), used.map(([pick, index]) => lane(pick, index)),
        make('p', {class: 'hint'}, 'Drag the ends to say when an adapter acts, the middle to set its weight. Arrow keys move a focused end by one step.')),
      where()), plan()));
  if (held) root.querySelector(`[aria-label="${CSS.escape(held)}"]`)?.focus({preventScroll: true});
}

function take() {
  const given = JSON.stringify(props.value || {picks: []});
  const empty = !element.querySelector('.board')?.children.length;
  if (given === written && !empty) return;
  const next = JSON.parse(given);
  next.picks = next.picks || [];
  if (next.merge) { // a job's news: what was edited while it ran stays
    const mine = new Map(state.picks.map(pick => [pick.name, pick]));
    const theirs = new Set(next.picks.map(pick => pick.name));
    next.picks = [...next.picks.map(pick => mine.get(pick.name) || pick), ...state.picks.filter(pick => !theirs.has(pick.name))];
    next.merge = false;
    state = next;
    return commit();
  }
  state = next;
  written = given;
  render();
}
watch('value', take);
take();
