// Completes <lora:NAME:WEIGHT> in the prompt from the library's names (this component's value).
const list = document.createElement('div');
list.setAttribute('role', 'listbox');
list.id = 'lora-names';
Object.assign(list.style, {display: 'none', position: 'relative', zIndex: 5, maxHeight: '14rem', overflow: 'auto', border: '1px solid var(--border-color-primary)', borderRadius: '6px', background: 'var(--background-fill-primary)'});
let at = 0;

const area = () => document.querySelector('#prompt textarea');
const open = text => /<lora:([^<>:]*)$/i.exec(text);
function close() { list.style.display = 'none'; list.replaceChildren(); }

function put(name) {
  const box = area(), end = box.selectionStart, before = box.value.slice(0, end).replace(/<lora:[^<>:]*$/i, `<lora:${name}:0.8>`);
  box.value = before + box.value.slice(end);
  box.setSelectionRange(before.length, before.length);
  box.dispatchEvent(new Event('input', {bubbles: true}));
  close(); box.focus();
}

function show() {
  const box = area(), found = open(box.value.slice(0, box.selectionStart));
  if (!found) return close();
  const names = (props.value || []).filter(name => name.toLowerCase().includes(found[1].toLowerCase())).slice(0, 12);
  at = Math.min(at, Math.max(0, names.length - 1));
  list.replaceChildren(...names.map((name, index) => {
    const row = document.createElement('div');
    row.setAttribute('role', 'option'); row.setAttribute('aria-selected', index === at);
    row.textContent = name;
    Object.assign(row.style, {padding: '.3rem .6rem', cursor: 'pointer', background: index === at ? 'var(--background-fill-secondary)' : ''});
    row.addEventListener('pointerdown', event => { event.preventDefault(); put(name); });
    return row;
  }));
  list.style.display = names.length ? 'block' : 'none';
}

function bind() {
  const box = area();
  if (!box) return void setTimeout(bind, 200);
  element.append(list);
  box.setAttribute('aria-controls', 'lora-names');
  box.addEventListener('input', () => { at = 0; show(); });
  box.addEventListener('blur', close);
  box.addEventListener('keydown', event => {
    if (list.style.display === 'none') return;
    const names = [...list.children];
    if (event.key === 'ArrowDown' || event.key === 'ArrowUp') { at = (at + (event.key === 'ArrowDown' ? 1 : names.length - 1)) % names.length; show(); }
    else if (event.key === 'Enter' || event.key === 'Tab') put(names[at].textContent);
    else if (event.key === 'Escape') close();
    else return;
    event.preventDefault(); event.stopPropagation();
  }, true);
}
bind();
