"""Spanish cues, of Spain and of the Americas."""

from __future__ import annotations

import re
from collections.abc import Mapping

from plugins.judges.lexicons.shape import Lexicon, table, words_of

WORDS: Mapping[str, str] = {
    "reply": (
        r"(?:respuesta|texto|version|borrador|propuesta|tono|estilo|formato|lista|resultado|"
        r"resumen|traduccion|cuenta|suma|total|numero|cifra|frase|parrafo|correo|mensaje|codigo|"
        r"solucion|explicacion|redaccion)s?"
    ),
    "be": (
        r"(?:es|esta|estan|son|era|fue|queda|quedo|quedan|suena|parece|sale|salio|sigue|viene|va)"
    ),
    "very": (
        r"(?:(?:muy|mas|super|tan|bien|bastante|realmente|totalmente|todo|algo|un poco|demasiado|"
        r"perfectamente|mucho|absolutamente|ya|de lo mas|simplemente|completamente)\s+)*"
    ),
    "good": (
        r"(?:perfect[oa]s?|genial(?:es)?|excelentes?|estupend[oa]s?|fantastic[oa]s?|"
        r"maravillos[oa]s?|buenisim[oa]s?|brutal|increibles?|fenomenal|magnific[oa]s?|"
        r"impecables?|clar[oa]s?|clarisim[oa]|correct[oa]s?|bien|buen[oa]s?|util(?:es)?|de lujo|"
        r"de maravilla|de diez|de 10|de perlas|redond[oa]|clavad[oa]|preciso|precios[oa]|"
        r"bonit[oa]|chul[oa]|guay|chid[oa]|padrisim[oa]|barbar[oa]|joya|mejor|ideal|acertad[oa])"
    ),
    "bad": (
        r"(?:mal|malisim[oa]|incorrect[oa]s?|erroneo?a?s?|equivocad[oa]s?|fals[oa]s?|"
        r"inutil(?:es)?|horribles?|fatal|pesim[oa]|confus[oa]s?|incomplet[oa]s?|vaci[oa]s?|"
        r"cortad[oa]s?|roto|rota|fri[oa]s?|robotic[oa]|sec[oa]|generic[oa]s?|aburrid[oa]|"
        r"inventad[oa]s?|al reves|cambiad[oa]s?|cruzad[oa]s?|desordenad[oa]s?|duplicad[oa]s?|"
        r"repetid[oa]s?|desactualizad[oa]s?|raro|rara|ilegibles?|larguisim[oa]|larg[oa]s?|"
        r"cort[oa]s?|formal(?:es)?|tecnic[oa]s?|complicad[oa]s?|un desastre|una chapuza|un lio)"
    ),
    "redo": (
        r"(?:corrige(?:lo|la|los|las)?|corregi(?:r|rlo|rla)|cambia(?:lo|la|los|las)?|"
        r"cambiar(?:lo|la)?|repite(?:lo|la)?|repetir(?:lo|la)?|rehaz(?:lo|la)?|rehacer(?:lo|la)?|"
        r"reescribe(?:lo|la)?|reescribir(?:lo|la)?|reformula(?:lo|la)?|acorta(?:lo|la)?|"
        r"acortar(?:lo|la)?|resume(?:lo|la)?|simplifica(?:lo|la)?|simplificar(?:lo|la)?|"
        r"revisa(?:lo|la|r|rlo|rla)?|comprueba(?:lo|la)?|arregla(?:lo|la|r|rlo|rla)?|quita(?:le|"
        r"lo|la|r|rle|rlo)?|elimina(?:lo|la|r)?|borra(?:lo|la|r)?|ajusta(?:lo|la|r)?|mejora(?:lo|"
        r"la|r)?|deshaz(?:lo|la)?|hazlo|hazla|hacerlo|ponlo|ponla|escribelo|dimelo|explicalo|"
        r"explicamelo|mira(?:lo|rlo)|sustituye|reemplaza|vuelve|volver|recalcula|calcula(?:lo)?)"
    ),
}

_IDIOMS = (
    (
        -1,
        (
            r"\bgracias por nada\b",
            r"\bno (?:me )?(?:sirve|funciona|va|vale|es (?:eso|asi|correcto|cierto|lo que|verdad|"
            r"ese|esa)|esta (?:bien|completo|correcto)|era (?:eso|asi|lo)|queda bien|cuadra\w*|"
            r"coincide\w*|entiendo|aparece\w*|sale|suena|veo|me (?:gusta|convence|cuadra|vale|"
            r"ayuda|aclara))\b",
            r"\bni (?:de lejos|de broma|por asomo|idea)\b",
            r"\bpodria (?:estar|ser) mejor\b|\bdeja (?:mucho|bastante) que desear\b",
        ),
    ),
    (
        1,
        (
            r"\bno (?:esta|queda|me parece) (?:nada )?mal\b|\bnada mal\b|"
            r"\bsin (?:ningun )?(?:errores|error|problemas?|fallos?|queja)\b",
            r"\bno (?:puedo|podria) (?:quejarme|pedir mas|estar mas (?:contento|contenta|"
            r"de acuerdo))\b|\bno (?:le )?(?:cambiaria|falta|sobra) nada\b|"
            r"\bno se puede (?:pedir mas|mejorar)\b",
            r"\b(?:tienes|tenias|tiene|tenia|llevas|llevabas) (?:toda la |mucha )?razon\b|"
            r"\b(?:me he|me habia|me) (?:equivocado|confundido|equivoque|confundi|liado)\b|"
            r"\bera yo\b|\b(?:culpa|error|fallo) mi[oa]\b|\b(?:mi|fue mi) (?:culpa|error|fallo)\b",
            r"\bya (?:me )?(?:funciona|va|anda|arranca|sale|carga|compila|entra|conecta|"
            r"esta (?:solucionado|arreglado|resuelto|funcionando)|abre|no (?:falla|sale el error|"
            r"da error|se cae|pita))\b(?! (?:mal|peor|lento))",
            r"\bno me lo (?:puedo )?cre[oe]r?\b",
        ),
    ),
    (
        0,
        (
            r"\bno (?:pasa nada|hay (?:problema|prisa)|te preocupes|importa|gracias)\b|"
            r"\bsin prisa\b",
            r"\bgracias (?:de antemano|por adelantado)\b",
            r"\b(?:buenos dias|buenas (?:tardes|noches)|buen dia|buena (?:pregunta|idea|"
            r"suerte))\b|^buenas\b",
            r"\b(?:otr[oa]s?|una? mas|dame otr[oa]|cuentame otr[oa]|otra mas)(?: (?:porfa|"
            r"por favor))?$",
            r"\b(?:que|esta) (?:es lo que )?(?:esta )?mal (?:en|con) (?:mi|este|esta)\b.*",
        ),
    ),
)

SPANISH = Lexicon(
    signs=words_of(
        """
        el la los las de que y en un una por para con es lo se te mi tu su más pero como está eso
        gracias del al ya si sí qué cómo cuál cuándo dónde este esta ese esa esos muy también porque
        me le les nos ni o era son hay sin sobre todo puedes puede quiero porfa favor ahora
        """
    ),
    idioms=tuple((value, table(rows, WORDS)) for value, rows in _IDIOMS),
    praise=table(
        (
            r"\b(?:al fin|por fin)\b|\b(?:magia|como magia|de cine|una maravilla|de fabula|"
            r"sin problema|10/10|un diez|espectacular|tremendo|bacan|copado|de una)\b|"
            r"\b(?:mi )?(?:jef[ea]|client[ea]|profe\w*|equipo|hij[oa]s?|marido|mujer|madre|padre|"
            r"vecin[oa]s?|abuela) (?:\w+ ){0,3}(?:content[oa]s?|feliz|felices|encantad[oa]s?|"
            r"emocion\w+|rio|rieron|aplaudi\w+|aprobad\w+)\b",
            r"\bya no (?!funciona|va|anda|arranca|aparece|esta|sale|abre|carga|se ve|puedo|"
            r"tengo tiempo|quiero|hay|hace falta|me sirve)\w+|\b(?:riquisim[oa]s?|delicios[oa]s?|"
            r"repitieron|aprobe|he aprobado|lo logre|lo consegui)\b",
            r"\b(?:mi )?(?:jef[ea]|client[ea]|profe\w*|equipo|hij[oa]s?|marido|mujer|madre|padre|"
            r"companer[oa]s?) (?:lo |la |los |le |les |me lo |ya )*(?:aprobo|acepto|firmo|"
            r"ha aprobado|ha aceptado|encant\w+|quedo content[oa]|esta content[oa]|"
            r"dio el visto bueno)\b|\bsin cambios$",
            r"\b(?:mas que |muy |super )?(?:feliz|contento|contenta|encantad[oa])\b",
            r"^(?:(?:ah+|oh|uy|hala|guau|wow|pues|ok|vale|si|y|muy|que|esta|es|todo|jaja\w*|ya|"
            r"buah|ostras|ahora si|de verdad|uf|ole|anda|eso|simplemente|mucho|"
            r"asi)\s+)*{good}(?:$|[ !]+(?:trabajo|respuesta|explicacion|explicado|hecho|gracias|"
            r"asi|idea|mil|muchas|resumen|todo|me|ahora|escrito|texto)\b)",
            r"\b(?:me|nos|le|les) (?:ha |han )?(?:encanta\w*|gusta|gusto|gustado|sirve|sirvio|"
            r"servido|ayuda\w*|ayudo|viene|vino|vale|quedo|va|cuadra\w*|convence)(?: (?:mucho|"
            r"muchisimo|un monton|genial|perfecto|asi|de lujo|bien|de perlas|todo|"
            r"de maravilla))?\b",
            r"\b(?:eso|esto|asi|ahora|ahora si|todo|lo|ya|{reply}) {be} {very}{good}\b|\b(?:ha |"
            r"han )?(?:quedado|salido|funcionado|resultado|quedo|salio|funciono|resulto|"
            r"ido) {very}{good}\b",
            r"\b(?:justo|exactamente|precisamente|tal cual) (?:lo que|eso|asi|como|lo)\b|"
            r"\blo que (?:buscaba|necesitaba|queria|andaba buscando|pedia|me hacia falta)\b|"
            r"^(?:exacto|eso es|correcto|asi es|justo|perfecto|listo|funciona|funciono|"
            r"solucionado|arreglado|resuelto|va|vale perfecto|clavado|tal cual|era eso|ole|olé|"
            r"bravo|crack|joya|de diez|de lujo)$",
            r"\b(?:era|fue) (?:justo |exactamente )?(?:eso|el cable|la|el|esa?|aquello|"
            r"ese)\b(?! (?:no|el error))|\b(?:efectivamente|en efecto)\b",
            r"\b(?:funciona|funciono|funcionando|solucionado|arreglado|resuelto|revivio|arranco|"
            r"aprobado|aprobo|publicado|subido|enviado|mandado|entregado|copiado|pegado|guardado|"
            r"fusionado|mergeado|desplegado|comprado|reservado|firmado|impreso)(?: (?:perfecto|"
            r"perfectamente|de maravilla|a la primera|ya|tal cual|bien|todo|asi|genial))?$|"
            r"^(?:ya )?(?:enviad|mandad|publicad|subid|copiad|entregad|impres)[oa]s?\b",
            r"\ba la primera\b|\bpor fin\b|\b(?:carpeta|tema|caso|asunto|ticket|"
            r"incidencia) (?:cerrad[oa]|solucionad[oa]|resuelt[oa])\b|\bse acabo el problema\b|"
            r"\bque alivio\b|\bque maravilla\b|\bque (?:bueno|crack|grande|maquina|gozada|"
            r"pasada)\b",
            r"\b(?:eres|sos|es usted|que) (?:un |una |el |la )?(?:crack|genio|maquina|sol|"
            r"fenomeno|grande|mejor|maestr[oa]|salvavidas|idol[oa]|angel|artista|capo|amor)\b|"
            r"\b(?:me|nos) (?:has |ha )?(?:salvado|salvaste|alegras|resolviste|resuelto|quitas|"
            r"has quitado)\b|\bte debo (?:una|un)\b|\bchapo\b|\bole tu\b",
            r"\b(?:me lo quedo|lo dejo asi|asi se queda|lo uso|lo mando|lo envio|lo publico|"
            r"lo subo|me quedo con|lo compro|me lo llevo|lo apruebo|aprobado|dale|adelante asi|"
            r"va a produccion|la uso|lo meto)\b",
            r"\b(?:ha|han|le|les) (?:encantado|colado|entendido|aprobado|convencido|gustado|"
            r"flipado|reido)\b|\b(?:ahora|ya) (?:si )?(?:lo |la )?(?:entiendo|pillo|veo claro|"
            r"tengo claro|capto)\b|\bmucho mejor\b|\b(?:ni|no) (?:un|una) (?:solo |"
            r"sola )?(?:error|fallo|queja|gota|pega)\b|\bcomo (?:nuevo|nueva|la seda)\b",
        ),
        WORDS,
    ),
    thanks=table(
        (
            r"\b(?:gracias|mil gracias|muchas gracias|muchisimas gracias|agradecid[oa]|"
            r"se agradece|te lo agradezco)\b(?! (?:de todos modos|igualmente|de todas formas|"
            r"igual|por nada))",
        )
    ),
    complaint=table(
        (
            r"^(?:(?:no|nop|pues|uy|hm+|mmm+|ay|sigue|sigue estando|esta|estan|es|sale|otra vez|"
            r"todo|muy|mas|un poco|demasiado|algo|totalmente|y|pero|eso|aqui|"
            r"que)\s+)*{bad}(?: (?:otra vez|calculad[oa]|escrit[oa]|traducid[oa]|hecho))?$",
            r"\b(?:esta|estan|es|son|suena|queda|parece|sale|salen|sigue|siguen|eso|quedo|"
            r"ha salido|viene) {very}(?:{bad})\b",
            r"\bdemasiad[oa]s?\b|\bmuy (?:larg[oa]|cort[oa]|formal|fri[oa]|sec[oa]|tecnic[oa]|"
            r"generic[oa])\b",
            r"^(?:no|nop|nope|que|eh|como|perdona|en serio|meh|uf|puaj|vaya|que va|pero que|eing|"
            r"ein)$|^no\b,? (?!gracias|pasa|hay|te preocupes|me lo|puedo|esta mal)\w+",
            r"\bsigue (?:sin|dando|saliendo|fallando|igual|estando|apareciendo|mal|cerrandose|"
            r"colgandose|lento|\w+ndo)\b|\bigual que antes\b|\b(?:el )?mismo (?:error|problema|"
            r"fallo|resultado)\b|\botra vez (?:lo mismo|el mismo|igual|mal)\b|\bde nuevo (?:mal|"
            r"igual)\b",
            r"\b(?:falta|faltan|falto|te (?:has )?(?:olvidado|olvidaste|comido|comiste|saltado|"
            r"saltaste|dejado|dejaste|equivocado|equivocaste|confundido|confundiste|liado)|"
            r"olvidaste|ignoraste|has (?:ignorado|olvidado|confundido|mezclado|borrado|cambiado|"
            r"puesto|quitado|inventado|dejado))\b",
            r"\b(?:te |le )?(?:pedi|dije|habia (?:pedido|dicho)|he (?:dicho|pedido)|solicite)\b|"
            r"\b(?:lo que )?(?:yo )?(?:queria|pedia|buscaba) (?:era|decir|un|una|solo|el|la|"
            r"que)\b|\bme referia\b|\bquise decir\b",
            r"\b(?:por que|porque) (?:has|me|esta|estan|no|tanto|tantos|tanta|pones|sale|sigues|"
            r"haces|tan)\b.*",
            r"\bno (?:cuadra\w*|coincide\w*|funciona\w*|hace|hizo|compila|carga|arranca|abre|"
            r"encuentro|existe\w*|respond\w+|ha (?:funcionado|cambiado|servido|hecho)|has|"
            r"tiene sentido|entend\w+|son lo|va|van|vale|sirve\w*|pone|dice|incluye\w*|"
            r"aparece\w*|se (?:ve|oye|entiende|abre|puede)|queria|quiero|pedi|pedia|tenias que|"
            r"debia\w*|hacia falta|he pedido|hay ningun\w*)\b",
            r"\b(?:se (?:ha )?(?:cerrado|cierra|cuelga|rompe|rompio|borro|borrado|cae|perdido|"
            r"perdio)|da error|me da error|peta|petando|falla|fallando|crashea|revienta|"
            r"ha desaparecido|desaparecio)\b",
            r"\b(?:dejalo|dejemoslo|olvidalo|dejame|da igual|es igual|paso|mejor lo hago yo|"
            r"lo miro yo|ya me apano|mejor lo|prefiero hacerlo|me rindo|no hay manera|"
            r"no hay forma|asi no vamos|no sirve de nada)\b",
            r"\b(?:parece|suena|como) (?:a |escrit\w+ por |hecho por |de |sacad\w+ de )?(?:un |"
            r"una )?(?:robot|maquina|plantilla|folleto|manual|traductor|telegrama|anuncio)\b",
            r"\b(?:seguro|estas segur[oa]|segura)\?*$|\bestas segur[oa]\b|\bque (?:es|"
            r"significa) (?:esto|eso)\b|\bque tiene que ver\b|\bno te (?:he )?(?:entiendo|pedi|"
            r"pedido)\b",
        ),
        WORDS,
    ),
    directive=table(
        (
            r"\b(?:rehac\w+|reescrib\w+|repetilo|cambialo|arreglalo)\b|\ben (?:una|dos|"
            r"tres) (?:frases?|lineas?|palabras?)$",
            r"\b(?:puedes|podrias|puede|podria|podes|te importa|te importaria|me lo puedes|"
            r"lo puedes|me puedes) (?:\w+ ){0,3}?(?:{redo}|mirar|hacerlo|ponerlo|decirlo|"
            r"explicarlo|explicarmelo|escribirlo|usar|evitar|ser)\b",
            r"\b(?:otra vez|de nuevo|nuevamente|desde cero|desde el principio)(?:[ ,]+(?:porfa|"
            r"por favor|pero|con|sin|y|en))*\b|^(?:vuelve|vuelva|volve|empieza|empecemos)\b|"
            r"\bvuelve a (?:empezar|hacer\w*|intentar\w*|calcular\w*|escribir\w*|generar\w*|"
            r"mirar\w*|probar|redactar\w*)\b|\b(?:intenta|prueba|intentalo|pruebalo)\b",
            r"(?:^|\b(?:y|pero|porfa|por favor|mejor|ahora|esta vez|asi que|"
            r"entonces) ){redo}\b(?! (?:mi|este|el siguiente|esta))",
            r"\b(?:mas|menos) (?:cort[oa]|larg[oa]|breve|sencill[oa]|simple|formal|informal|"
            r"cercan[oa]|amable|calid[oa]|clar[oa]|concret[oa]|corto|natural|human[oa]|detalle|"
            r"detallad[oa]|conciso)\b(?: (?:porfa|por favor))?",
            r"\b(?:deberia|deberian|debe|deben|tiene que|tienen que|tenia que|habria que|hay que|"
            r"deberias|tendria que|tendrian que|seria|serian) (?:ser |estar |poner |decir |ir |"
            r"llevar |salir |quedar |usar |incluir )?\w+",
            r"\b(?:la proxima|para la proxima|de ahora en adelante|a partir de ahora|esta vez|"
            r"en adelante)\b(?! (?:la|lo) rieg)",
            r"\b(?:en vez de|en lugar de|sin (?:negritas?|listas?|emojis|asteriscos|vinetas|"
            r"titulos|numeros|adornos))\b|\bpreferir?ia\b|\bprefiero\b|\bmejor (?:sin|con|en|un|"
            r"una|que)\b",
            r"(?:^|\b(?:y|pero|porfa|por favor) )(?:no (?:uses|pongas|hagas|incluyas|cambies|"
            r"escribas|repitas|te inventes|toques|traduzcas|me des|mandes)|dame|ponme|pon|usa|"
            r"deja|anade|incluye|genera|escribe|haz|di) (?:\w+ ){0,4}?(?:solo|otr[oa]s?|esta vez|"
            r"sin|mas|menos|como te|tal como|bien|correct\w+|de verdad|entero|completo)\b",
        ),
        WORDS,
    ),
    mockery=table(
        (
            r"\bgracias por (?:ignorar|perder|borrar|romper|no|hacerme|complicar)\w*\b|"
            r"\b(?:felicidades|enhorabuena|felicitaciones)[,!.]* (?:ahora|ya|has|lo)\b|"
            r"\bporque a todo el mundo\b|\bclaro,? porque\b",
            r"\bquien necesita\b|\bproblema (?:resuelto|solucionado)[,.!] (?:si|total|ya|solo)\b|"
            r"\basi cualquiera\b|\b(?:va|van) a (?:llorar|flipar|alucinar|morirse)\b|"
            r"\bde (?:la )?emocion\b|\bque (?:alegria|alivio|tranquilidad) (?:saber|que)\b|"
            r"\bsuerte que\b",
            r"\b(?:genial|perfecto|estupendo|fantastico|maravilloso|que bien|muy bien|bravo|olé|"
            r"ole|brillante|excelente|gracias|claro|que ilusion|"
            r"que detalle)[,.! ]+(?:\w+[, ]+){0,6}?\w{2,}(?:re|ras|ra|remos|ran|ria|"
            r"riamos)\b(?! (?:gracias|usarlo))",
            r"\bque (?:bien|suerte|detalle|ilusion|util|practico|considerad[oa]|amable|list[oa]|"
            r"original|revelacion|sorpresa|novedad|lujo) (?:que|de|tener|lo de|saber)\b",
            r"\b(?:menos mal|suerte|lo bueno|menuda suerte) que\b.{0,80}(?:\beh\b|\bno\b)?|"
            r"[,.] eh[.!]*$|\bno me digas\b|\bno (?:me )?lo (?:habria|hubiera) (?:imaginado|"
            r"pensado|adivinado)\b|\bjamas (?:se me|lo) (?:habria|hubiera)\b|"
            r"\bquien (?:lo )?(?:diria|iba a decir)\b|\bnunca se me (?:habria|hubiera) ocurrido\b",
            r"\b(?:sherlock|einstein|capitan obvio|premio nobel|nobel|pulitzer|te has lucido|"
            r"te luciste|lumbrera|un aplauso|menudo genio|vaya (?:genio|maravilla|joya|lince|"
            r"crack|tela|descubrimiento)|menud[oa] (?:ayuda|joya|lince|descubrimiento|novedad)|"
            r"casi nada|ni tan mal|muy gracios[oa]|que gracioso|si claro|claro que si guapi|"
            r"como no|descubriste|has descubierto|has inventado)\b",
            r"\b(?:mi|hasta mi) (?:abuela|gato|perro|tostadora|hijo de \w+|sobrino|"
            r"calculadora) (?:lo |la |me |ya |tambien )*\w+|\bya (?:solo )?(?:puestos|nos queda|"
            r"falta|faltaria)\b.*|\bpara eso (?:ya )?(?:tengo|miro|estaba|me)\b|\bcomo si\b|"
            r"\by yo (?:que|soy|con)\b|\bqueria (?:arruinar|perder)\b|\bpues nada\b|"
            r"\bcon razon\b|\bahora resulta\b|\bsolo me faltaba\b|\bque haria yo sin\b|"
            r"\bgracias por (?:avisar|descubrir|aclarar|el dato|recordarme|la obviedad|tanto)\b",
        )
    ),
    earnest=table((r"\b(?:en serio|de verdad|bromas aparte|fuera de broma|es broma)\b",)),
    undecided=table(
        (
            r"\b(?:la mayoria|casi tod[oa]s?|algun[oa]s|no tod[oa]s|habra que ver|a ver (?:que|"
            r"si|como)|depende|lo (?:consulto|comento|hablo|pregunto)|tengo que (?:ver|consultar|"
            r"preguntar|pensar)\w*|hay que ver|no acabo de|en su mayor parte|me lo pienso|"
            r"no se (?:si|que)|dudo|tengo dudas|segun (?:se|lo|como))\b",
            r"^\b(?:el|la|los|las|del?|al|una?|otr[oa]s?|primer[oa]?|segund[oa]|tercer[oa]?|"
            r"lunes|martes|miercoles|jueves|viernes|sabado|domingo)\b (?:\w+ ){0,3}?(?:ya |esta |"
            r"estan )?(?:funciona|funcionan|va|van|carga|cargan|sale|salen|bien|perfect[oa]s?|"
            r"genial|list[oa]s?|mejor|correct[oa]s?|arreglad[oa]s?|"
            r"ok)\b[^?]{0,60}[,;.] ?(?:pero |y |aunque )?\b(?:el|la|los|las|del?|al|una?|"
            r"otr[oa]s?|primer[oa]?|segund[oa]|tercer[oa]?|lunes|martes|miercoles|jueves|viernes|"
            r"sabado|domingo)\b [^?]{0,60}\b(?:no|sigue|siguen|falta|faltan|aun|todavia|tampoco|"
            r"igual|mal|vaci[oa]|error|lent[oa]|ni idea|dudas|nada)\b",
            r"\b\d+ de (?:l[oa]s )?\d+\b|\baun no (?:del todo|todo|esta)\b|\bno del todo\b",
            r"\bla mitad\b|\bel resto (?:no|sigue|aun|todavia|falta)\b|\bsolo (?:dos|tres|uno|"
            r"una|algunos|algunas|la mitad)\b",
            r"\ba lo mejor\b|\bsegun como\b|\b(?:quiza|quizas|tal vez)\b",
            r"\b(?:funciona|funcionan|va|van|anda|andan|carga|sale|entra|mejor|rapido|"
            r"arreglad\w)\b.{0,80}\b(?:pero|aunque|en cambio|solo que|el otro|la otra|"
            r"los otros)\b.{0,80}\b(?:no|sigue|siguen|aun|todavia|falta|faltan|tarda)\b",
            r"\b(?:l[oae]s? |te |ya |me l[oa] |echo un |lo )*(?:miro|leo|pruebo|veo|reviso|"
            r"pienso|consulto|hablo|pregunto|comento|vistazo)\b(?: \w+){0,3} (?:luego|manana|"
            r"esta (?:tarde|noche|semana)|este finde|el (?:lunes|martes|miercoles|jueves|viernes|"
            r"sabado|domingo)|despues|mas tarde|con calma|en casa|a ver)\b|\bte (?:digo|cuento|"
            r"aviso|comento|confirmo|dire|avisare|confirmare)(?: (?:algo|luego|manana|cosas))?\b|"
            r"\bya te (?:digo|cuento|dire|aviso)\b|\bdejame (?:mirar|pensar|verlo|leer|revisar|"
            r"consultar\w*|probar\w*)\b",
            r"\b(?:aun|todavia) no (?:se|lo|la|he|tengo|puedo|estoy)\b|\bno (?:se|"
            r"estoy segur[oa]|tengo claro)(?: si| que| todavia| aun)?\b|\btengo (?:que|"
            r"mis) (?:consultar\w*|pensar\w*|hablar\w*|probar\w*|dudas|mirar\w*|preguntar\w*)\b|"
            r"\bpuede que (?:sea|este) (?:mi|yo|cosa mia|el)\b|\bigual (?:es|soy|"
            r"son) (?:cosa mia|mi|yo)\b|\ba lo mejor (?:es|soy) (?:mi|yo)\b",
            r"\b(?:a medias|mitad|regular|mas o menos|en parte|parcialmente|ni fu ni fa|depende|"
            r"unas si|algunos si|algo mejor|va mejor|mejoro|un poco mejor|a ratos|no todo|"
            r"ha mejorado|pero algo)\b|\bde lo otro\b|\bdel resto\b|\bdel otro\b|\bveremos\b|"
            r"\bya veremos\b|\bpor ahora (?:bien|va)\b|\blo (?:hablamos|pienso|vemos)\b",
        )
    ),
    doubt=table(
        (
            r"\b(?:creo|creia|juraria|diria|me parece|me suena|tengo entendido|pense|pensaba|"
            r"si no me (?:equivoco|falla)|que yo sepa|segun (?:yo|tengo|el|la)|perdona|disculpa|"
            r"perdon|una cosa|un detalle|detallito|solo un|casi|en realidad|realmente|no (?:sera|"
            r"seria|era|es|son|deberia|hay|habia|deberian)|eso es|es que|seria|serian|"
            r"quedamos en|en todo caso|mas bien|ojo|cuidado|solo|unicamente|pone|ponia|aparece|"
            r"me sale|era|eran|vs)\b|\bno\?*$|\bverdad\?*$|\bpero\b",
        )
    ),
    negation=table((r"\b(?:no|ni|nada|nunca|tampoco|sin|ningun|ninguna|falta|faltan)\b",)),
    new_task=table(
        (
            r"^(?:(?:ok|vale|bueno|y|pues|bien|perfecto|genial|listo|gracias|"
            r"ya)\s+)*(?:lo siguiente|siguiente|otra (?:cosa|pregunta|duda|tarea)|"
            r"cambiando de tema|cambio de tema|por cierto|oye(?: y| una)?|ahora (?:necesito|"
            r"quiero|otra|vamos|toca|dime|ayudame)|pasemos|pasamos|vamos (?:con|a)|a otra cosa|"
            r"otro tema|ademas|de paso|mientras tanto|ponme mientras|espera|un momento|"
            r"un segundo|dame un segundo|hablando de|que me (?:llaman|llama)|nueva (?:pregunta|"
            r"tarea))\b",
        )
    ),
    soft_transition=table(
        (
            r"^(?:(?:ok|vale|bueno|y|pues|bien|hola|buenas|si|ya|oye|entonces|ah|mmm+|"
            r"eh)\s+)*(?:que|como|quien|cuando|donde|cual|cuales|cuanto|cuanta|cuantos|cuantas|"
            r"a que|en que|de que|por donde|puedes|podrias|me (?:puedes|ayudas|das|dices|"
            r"recomiendas|haces|pones|apuntas|buscas)|sabes|hay|existe|tienes|conoces|se puede|"
            r"quiero|necesito|busco|quisiera|me gustaria|ayudame|hazme|dime|busca|apuntame|anota|"
            r"recuerdame|recomiendame|traduce|escribeme|cuentame|vale la pena|hace falta|sirve|"
            r"funciona|hay que|tengo que|debo|puedo)\b",
        )
    ),
    reference=table(
        (
            r"\b(?:eso|esto|asi|otra vez|de nuevo|tu|tus|has|esa|ese|lo (?:has|que)|esta vez|"
            r"en vez|en lugar|mejor|{reply})\b",
        ),
        WORDS,
    ),
    no_reference=table((r"\b(?:tu opinion|lo que (?:quieras|sea)|esto de|has (?:oido|visto))\b",)),
    pointed=table(
        (
            r"\b(?:demasiad\w+|muy|falta\w*|te pedi|te dije|queria|en vez de|seria\w*|deberia\w*|"
            r"juraria|creo que)\b",
            r"\b(?:mal|incorrecto|no)\b.*\d",
        )
    ),
    imperative=table(
        (
            r"^(?:(?:y|pero|entonces|porfa|por favor|solo|tambien|mejor|esta vez)\s+)*(?:{redo}|"
            r"usa|pon|di|da|dame|nombra|incluye|anade|escribe|haz|sin|con|solo|nada de|deja|"
            r"genera|elige)\b",
        ),
        WORDS,
    ),
    order=table(
        (
            r"^(?:(?:y|pero|entonces|ahora|ok|bueno|no|mejor|por favor|porfa)\W+)*(?:{redo}|"
            r"menciona|incluye|nombra|explica|describe|cuenta|responde|compara|recuerda)\b",
        ),
        WORDS,
    ),
    contrast=re.compile(
        r"[,;:—–-]*\s+(?:pero|sin embargo|aunque|salvo que|excepto|solo que|eso si)\s*,?\s+|"
        r"^(?:pero|sin embargo|aunque|eso si)\s*,?\s+",
        re.IGNORECASE,
    ),
    conjunction=re.compile(r"\s+(?:y|porque|ya que|asi que)\s+", re.IGNORECASE),
    answered=re.compile(
        r"^(?:no|si|sí|claro|vale|correcto|exacto|dale|por supuesto)\b(?!\W+gracias)\W*",
        re.IGNORECASE,
    ),
    bare=words_of(
        """
        por favor porfa puedes podrias lo la eso otra vez de nuevo hazlo repite repitelo corrige
        corrigelo arreglalo revisalo revisa mira miralo vuelve a empezar intentalo intenta prueba
        ahora y bien pues no ok vale desde cero
        """
    ),
    common=words_of(
        """
        el la los las un una unos unas de del al a en por para con sin y o e u que qué como cómo es
        son era fue ser está están estar esta este esto ese esa eso esos lo le les se me te nos mi
        tu su sus mis tus más mas menos muy ya no sí si pero porque cuando cuándo donde dónde quien
        quién cual cuál hay ha han he has haber puede puedes podrías podrias quiero quieres favor
        porfa gracias ahora también tambien solo sólo todo toda nada algo otra otro vez nuevo haz
        hazlo dame dime pon ponlo escribe texto respuesta lista frase corto corta largo mejor bien
        mal correcto así asi entonces bueno vale ok hola buenas
        """
    ),
)
